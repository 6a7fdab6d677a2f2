"""What lies on disk between building and running: recipes, manifests, the store that builds write into, readers.

Takes: paths, TOML, JSON.  Gives: checked values; files that appear whole or not at all.
May touch: the bundle folder, the files it is named.
"""
