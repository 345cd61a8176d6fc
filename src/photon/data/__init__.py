"""Text to tokenised shards, and shards to an endless seekable stream; no torch."""

from photon.data.held_out import Window, held_out_text
from photon.data.options import PrepareOptions
from photon.data.partition import DocumentInfo, Partitioner
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData, SiloData, open_data
from photon.data.stream import TokenStream, open_stream, token_stream
from photon.data.tokenizer import load_tokenizer, tokenizer_identity

__all__ = [
    "DocumentInfo",
    "Partitioner",
    "PrepareOptions",
    "PreparedData",
    "SiloData",
    "TokenStream",
    "Window",
    "held_out_text",
    "load_tokenizer",
    "open_data",
    "open_stream",
    "prepare",
    "token_stream",
    "tokenizer_identity",
]
