"""The executable textbook of the course: multimodal transformers from scratch.

Read the modules in this order; each is imported by those after it, never the other way.

    transformer      attention, the block, the encoder: the one model that everything here is
    text             a byte-pair tokenizer and token embeddings
    wordpiece        BERT's tokenizer, for pages of words
    vision           patches, the Vision Transformer, a convolutional stem
    audio            from a waveform to a log-mel spectrogram and its patches, and back
    convolution      a strided convolution along time, as matrix products
    contrastive      the losses that pull a picture to its own caption: softmax, sigmoid, tiled
    clip             two towers that meet in one space (Radford et al. 2021)
    pages            words with boxes become tokens with boxes
    layoutlm         words that know their place on the page (Xu et al. 2020)
    quantization     codebooks chosen by a hard Gumbel-softmax (Jang et al. 2017)
    ctc              letters from frames: the loss, greedy and beam decoding (Graves et al. 2006)
    wav2vec2         speech learned without labels, then read with few (Baevski et al. 2020)
    streams          several modalities at once: checked, masked, dropped, resampled
    fusion           nine ways for modalities to meet: early, late, hybrid
    captioning       a decoder that says what it sees and hears; greedy and beam search
    modalities       twelve modalities become sequences of tokens
    metatransformer  one encoder that reads them all (Zhang et al. 2023)
    foundations      encoders that know something already, and heads to put on them
    transfer         freeze, tune in stages, linear probe, cross-validation
    lora             adapt by two thin matrices beside each weight (Hu et al. 2021)
    interpret        attention rollout, modality ablation, integrated gradients
    xray             which layers depend on which modality, measured by intervention
    weights          strict, loud copying of weights from and to other libraries
    train            seeds, devices, a learning-rate schedule and one flat training loop
    metrics          accuracy, recall@k, calibration, error rates
    data             data sets that need no network, and their larger twins on the hub
    feedback         what a notebook's visible check says when an answer is wrong
    figures          pictures with a description, in colours that everyone can tell apart

The dimension key. A suffix on a name, or a letter in a type, always means:

    B batch             L sequence          S key length         D model width
    H heads             K width per head    F feed-forward       V vocabulary, codebook entries
    G codebooks         E shared embedding  I images             T texts
    N negatives         M modalities        C classes

Attention masks mean one thing everywhere: True = may attend.
"""
