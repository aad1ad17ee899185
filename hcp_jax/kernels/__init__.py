"""The blockwise attention core: what one device computes, with no mesh and no axis names."""
