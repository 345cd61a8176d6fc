"""Text to tokenised shards, and shards to an endless seekable stream; no torch."""

from photon.data.held_out import HeldOut, held_out_text
from photon.data.ingest import Document, Source
from photon.data.partition import DocumentInfo, Partitioner
from photon.data.prepare import PrepareOptions, prepare
from photon.data.prepared import PreparedData, TextSet, open_data
from photon.data.stream import TokenStream, token_stream
from photon.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Document",
    "DocumentInfo",
    "HeldOut",
    "Partitioner",
    "PrepareOptions",
    "PreparedData",
    "Source",
    "TextSet",
    "TextTokenizer",
    "TokenStream",
    "held_out_text",
    "load_tokenizer",
    "open_data",
    "prepare",
    "token_stream",
    "train_tokenizer",
]
