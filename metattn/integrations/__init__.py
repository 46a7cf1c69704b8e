"""Places where metattn takes over another library's attention; each a short file, or a package of them."""
