"""The studies behind docs/experiments.md; `python -m experiments` lists them.

A task's file makes its data and its model; `body` is the transformer that all
of them share, `recipe` trains and tests it, `records` keeps what came of it in
one CSV file and one NPZ file a study, `sweep` runs tasks × attentions × seeds,
`report` and `plots` make tables and pictures of them, `compare` pairs runs that
differ in their attention alone, and `pages` copies tables into the pages.
`offload` packs runs for a machine with an accelerator and no TensorFlow, where
`remote` makes them.
"""
