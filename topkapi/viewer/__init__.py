"""A run in a browser: what its latents fire on, what they do, and the whole dictionary at a glance.

    topkapi view runs/demo            serves the page and its numbers on this machine
    topkapi export runs/demo OUT      the same page as files, for any static host

1. `opened`: a run, its study, and what is loaded in the background. `labels`: names that people give to latents
2. The numbers: `latents` (one latent), `examples`, `overview` (all of them), `runs`, `columns` and `index` (the table)
3. `worker`: the one thread that runs the language model. `experiments`: what it is asked for
4. `asking`: reads and checks requests. `guard`: who may ask. `answers`: JSON. `app`: the routes
5. `serve`: the command topkapi view. `export`: topkapi export. `static/`: the page

docs/viewer.md describes the API. Every number comes from `topkapi.study`, `topkapi.statistics` or `topkapi.explore`.
"""
