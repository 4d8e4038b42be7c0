"""Dense to smaller dense: width by activation importance, depth by block influence."""
