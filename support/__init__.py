"""What the scripts lean on and a reader may skip: files, checkpoints, the command line, the machine, the judge, ...

Nothing here is needed to understand the model; DiT and diffusion are in the modules at the root.
"""
