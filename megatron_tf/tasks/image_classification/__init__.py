"""Classification of images: a vision transformer's patches and head around the blocks of any architecture."""
