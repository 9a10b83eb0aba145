"""Rows of a study, made up."""

COLUMNS = {
    "score": 0.5,
    "validation": 0.5,
    "metric": "accuracy",
    "task": "sparsity",
    "title": "Sparsity",
    "key_dim": 8,
    "sizes": "",
    "flags": "",
}


def rows(attention, scores, **columns):
    """A row a seed, as read from a CSV file."""
    return [
        {
            name: str(value)
            for name, value in {
                **COLUMNS,
                "attention": attention,
                "seed": seed,
                "score": score,
                "validation": score,
                **columns,
            }.items()
        }
        for seed, score in enumerate(scores)
    ]
