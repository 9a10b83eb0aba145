"""WordPieces: a vocabulary learnt from documents, and its tokenizer."""

import sys

import numpy as np
import tensorflow as tf
import tensorflow_text
from tensorflow_text.tools.wordpiece_vocab import bert_vocab_from_dataset

from examples.progress import working
from experiments import reviews

RESERVED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLASS, SEPARATOR, MASK = range(5)
# The vocabulary is learnt from so many documents, which takes a minute or two.
VOCABULARY_DOCUMENTS = 8000


def tokenizer(vocabulary):
    return tensorflow_text.FastBertTokenizer(
        vocabulary, token_out_type=tf.int32, lower_case_nfd_strip_accents=True
    )


def read_documents(args):
    """Texts to learn the vocabulary from and to pretrain on, shuffled."""
    if args.text is None:
        documents = reviews.unlabelled(args.data_dir)
    elif args.text.exists():
        lines = args.text.read_bytes().splitlines()
        documents = [line for line in lines if line.strip()]
    else:
        sys.exit(
            "--text must be a text file, a document a line. Received: "
            f"{args.text}, which does not exist. Without it the reviews of "
            "IMDb are read from --data-dir."
        )
    order = np.random.default_rng(0).permutation(len(documents))
    return [documents[i].replace(b"<br />", b" ") for i in order]


def read_vocabulary(documents, args):
    """WordPieces: those of the file, or learnt ones that go into it."""
    path = args.vocabulary
    if path and path.exists():
        return path.read_text("utf-8").splitlines()
    dataset = tf.data.Dataset.from_tensor_slices(
        documents[:VOCABULARY_DOCUMENTS]
    )
    with working("Learning a vocabulary"):
        vocabulary = bert_vocab_from_dataset.bert_vocab_from_dataset(
            dataset.batch(500),
            args.vocabulary_size,
            RESERVED,
            bert_tokenizer_params={"lower_case": True},
        )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(vocabulary), "utf-8")
    return vocabulary


def token_stream(documents, tokenize, count):
    """At least `count` tokens if the documents have them, [SEP] between."""
    parts, total = [], 0
    for start in range(0, len(documents), 500):
        batch = tokenize.tokenize(documents[start : start + 500])
        ends = tf.fill((batch.nrows(), 1), SEPARATOR)
        parts.append(tf.concat([batch, ends], 1).flat_values)
        total += len(parts[-1])
        if total >= count:
            break
    return np.concatenate(parts).astype("uint16")
