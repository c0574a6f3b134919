"""What may come in, at most. Readers of what a user hands over ask here, and their errors say the number.

The numbers are generous: DeepSeek-V3 has 61 layers, 256 experts, 91 thousand tensors, an index of 9 MB and a graph file
of some 60 MB. They exist so that a damaged or hostile file costs seconds and megabytes, not hours and the machine.
"""

MIB = 1 << 20

NESTING = 64
"""Levels of lists and objects in a JSON or YAML document."""
NUMBER_DIGITS = 40
"""Characters of one number in a document."""
VALUES = 3_000_000
"""Commas of a JSON document, so that no few bytes become gigabytes of objects. A graph file has one in 32 bytes."""
NAME_LENGTH = 512
"""Characters of the name of a tensor, module or graph node."""
RANKS = 4096
"""Tensor-parallel ranks that a manifest may name."""
ONNX_BYTES = 1 << 31
"""A model.onnx, whose weights are elsewhere; what protobuf takes."""

NODES = 1 << 20
"""Nodes, parameters, recipes of a graph file, and tensors that one of them names."""
RANK = 16
"""Dimensions of a tensor of a graph."""
SIZE = 1 << 40
"""Any one size, and any number that a graph computes of sizes."""
PIECES = 4096
"""Tensors that one call of a graph gives."""
VALUE_BYTES = 1 << 29
"""What the values of a graph that are alive together may take for two sequences of 12 tokens; or four times the largest
parameter in float32, if that is more."""
BATCH_BYTES = 1 << 45
"""What one call may take for a million tokens, 1013 to a sequence: no value may grow much faster than their number."""

CONFIG_BYTES = 16 * MIB
"""A config.json, a tokenizer_config.json, a policy, a chat template."""
INDEX_BYTES = 128 * MIB
"""An index or a description: one line a tensor."""
GRAPH_BYTES = 256 * MIB
"""A graph, a ledger or a manifest: some lines a tensor."""
HEADER_BYTES = 100_000_000
"""The header of a safetensors file; the format's own limit (safetensors, MAX_HEADER_SIZE)."""
TENSORS = 250_000
"""Tensors of one safetensors file; the largest public models have some 150 thousand in all their files."""
DIMENSIONS = 16
"""Of one tensor."""
CHECKPOINT_TENSORS = 400_000
"""Tensors of all files of a checkpoint."""
FILE_NAME_BYTES = 255
"""Of a file's name, without its folder; what file systems take."""

TEXT_BYTES = 64 * MIB
"""A .json of texts, and a line of a .jsonl. A .txt and a .jsonl may be larger: no more is read than is needed."""
PIECE_CHARACTERS = 1 << 20
"""Of a text, what is tokenized at a time."""
TOKEN_ID_BYTES = 512 * MIB
"""A .npy or .safetensors of token ids."""
TOKENIZER_BYTES = 128 * MIB
"""A tokenizer.json; DeepSeek-V3's has 8 MB."""
TOKENIZER_MEMORY = 1920 * MIB
"""Of the process that runs a tokenizer, whose library takes some 400 bytes a token."""
TOKENIZER_SECONDS = 3
"""To open a small tokenizer, in seconds of computing; one of 8 MiB may take twice as long, and so on."""
TEXT_SECONDS = 3
"""To render a chat or to tokenize a short text, in seconds of computing."""
WALL = 2
"""How many times longer than they compute tokenizers and templates may take, on a machine that is busy."""
TEMPLATE_MEMORY = 256 * MIB
"""Of the process that runs a chat template."""

OUTPUT_BYTES = 64 << 10
"""Kept of what a model.py, or another process that we start, prints: the end of it."""
ANSWER_BYTES = 512 * MIB
"""What the process of a model.py hands back: its graph as text."""

POLICY_BYTES = MIB >> 2
"""A policy file: thousands of rules."""
POLICY_VALUES = 20_000
"""Texts, lists and mappings in a policy file; those of an alias count wherever it is used."""
POLICY_DEPTH = 16
"""Files that extend one another."""

LAYERS = 512
"""Decoder layers."""
EXPERTS = 8192
"""Routed experts of a layer."""
ALL_EXPERTS = 1 << 16
"""Routed experts of all layers together, four times DeepSeek-V3's: each is three tensors that are named and placed."""
MTP_LAYERS = 16
"""Multi-token prediction layers."""
HEADS = 1 << 14
"""Attention heads."""
WIDTH = 1 << 22
"""A width in features, or a vocabulary."""
POSITIONS = 1 << 40
"""Positions of a context."""
PARAMETERS = 10**15
"""Numbers in all tensors of a model: a thousand times the largest open ones."""
