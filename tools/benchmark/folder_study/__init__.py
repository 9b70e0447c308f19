"""Parts of the study on folders of images with different numbers of images per person."""
