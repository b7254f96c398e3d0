"""From text to shuffled batches of activations: corpora, tokens, language model, activations, batches.

    corpora.documents -> tokens.tokenize -> language_model.LanguageModel
        -> activations.LiveBlocks or CachedBlocks -> batches.ShuffledBatches, on CUDA pipeline.BatchesAhead

The only folder that imports transformers and datasets, and it does so inside functions: importing it
is quick and silent.
"""
