"""What can take the place of one core part, or extends one: a file is one idea with its paper.

Each has the interface of the part that it replaces: that of `dit_block.Block`, or of `diffusion.Diffusion`.
"""
