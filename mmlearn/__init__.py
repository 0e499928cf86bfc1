"""The executable textbook of the course: multimodal transformers from scratch.

Read the modules in this order; each is imported by those after it, never the other way.

    transformer  attention, the block, the encoder: the one model that everything here is
    text         a byte-pair tokenizer and token embeddings
    vision       patches, the Vision Transformer, a convolutional stem
    contrastive  the losses that pull a picture to its own caption: softmax, sigmoid, tiled
    clip         two towers that meet in one space (Radford et al. 2021)
    weights      strict, loud copying of weights from and to other libraries
    train        seeds, devices, a learning-rate schedule and one flat training loop
    metrics      accuracy, recall@k, calibration, error rates
    data         small data sets that need no network, and their larger twins on the hub
    feedback     what a notebook's visible check says when an answer is wrong

The dimension key. A suffix on a name, or a letter in a type, always means:

    B batch             L sequence          S key length         D model width
    H heads             K width per head    F feed-forward       V vocabulary, codebook entries
    G codebooks         E shared embedding  I images             T texts
    N negatives         M modalities        C classes

Attention masks mean one thing everywhere: True = may attend.
"""
