"""A language model and a corpus made in a second, for tests that need no real ones."""

import json
from pathlib import Path

import numpy as np

DETERMINERS = ["the", "a", "this", "every", "some", "no"]
ADJECTIVES = ["old", "red", "quiet", "early", "broken", "tall", "distant", "simple", "careful", "northern"]
NOUNS = [
    "river",
    "house",
    "engineer",
    "morning",
    "letter",
    "garden",
    "machine",
    "question",
    "captain",
    "winter",
    "bridge",
]
NOUNS += [
    "journal",
    "scholar",
    "mountain",
    "lantern",
    "village",
    "doctor",
    "orchard",
    "theatre",
    "compass",
    "harbour",
    "notebook",
]
VERBS = ["finds", "follows", "opens", "remembers", "carries", "leaves", "builds", "answers", "watches", "crosses"]
VERBS += ["describes", "gathers", "imagines", "protects", "welcomes"]
ADVERBS = ["slowly", "again", "often", "quietly", "never", "yesterday"]


def sentences(seed: int, count: int) -> str:
    """English-like sentences, the same for the same seed."""
    random = np.random.default_rng([seed, count])

    def one(words: list[str]) -> str:
        return words[random.integers(len(words))]

    def phrase() -> str:
        return f"{one(DETERMINERS)} {one(ADJECTIVES)} {one(NOUNS)}"

    made = [f"{phrase()} {one(VERBS)} {phrase()} {one(ADVERBS)}." for _ in range(count)]
    return " ".join(sentence.capitalize() for sentence in made)


def make_corpus(path: Path, n_documents: int) -> str:
    """Write documents of 2 to 20 sentences (25 to 250 tokens) as JSONL; returns the corpus's name."""
    lines = [json.dumps({"text": sentences(i, 2 + i * 7 % 19)}) for i in range(n_documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"jsonl:{path}"


def make_language_model(folder: Path, architecture: str = "llama", vocabulary: int = 512) -> Path:
    """Save a random model of 2 layers and d_model 64, with a byte-level BPE tokenizer; returns the folder.

    `architecture` is llama or gpt2. The same weights each time.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(vocabulary)
    end = tokenizer.eos_token_id
    common = {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if architecture == "gpt2":
            config = GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=128, **common)
            model = GPT2LMHeadModel(config)
        else:
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            config = LlamaConfig(**sizes, **heads, max_position_embeddings=128, **common)
            model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(999, 400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
