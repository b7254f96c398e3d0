"""The complete sparse code of a corpus, and what it says of each latent.

1. `writer`: one pass over text writes which latents fire on which token, and how strongly.
2. `invert`: the same entries in order of latents, by a counting sort of bounded memory.
3. `layout`: the files of a study; docs/study-format.md.
4. `reader`: opens a study. `latent`: what it says of one latent. `directions`: neighbours and tokens voted for.

    study = topkapi.study.open("runs/demo/study")
    study.density, study.latent(17).top(5)
"""

from topkapi.study.reader import Study
from topkapi.study.reader import open_study as open
from topkapi.study.writer import write_study

__all__ = ["Study", "open", "write_study"]
