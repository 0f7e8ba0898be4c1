"""A file for each kind of data: a loader is a function of (data_dir, train) -> images (N, C, H, W) uint8, labels (N,),
with class names as a third where the classes have any.

`dataset.py` names them, and check.py holds what they give against that promise. (The folder is not called `datasets`,
which would hide Hugging Face's library of that name.)
"""
