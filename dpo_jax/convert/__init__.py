"""Models from and to Hugging Face folders.

``pretrained`` opens and saves folders, ``engine`` moves tensors, ``tensors`` reads and writes files; to add a family,
write its ``Table`` in a module of its own and add its line to ``pretrained.TABLES``.
"""
