"""Limits on input: the largest files, counts and sizes that fxquant accepts. Error messages quote these numbers.

The limits are generous: DeepSeek-V3 has 61 layers, 256 experts, 91 thousand tensors, a 9 MB index and a graph file of
about 60 MB. They ensure that a damaged or hostile file costs seconds and megabytes, not hours and the machine.
"""

MIB = 1 << 20

NESTING = 64
"""Nesting levels of a JSON or YAML document."""
NUMBER_DIGITS = 40
"""Characters of one number in a document."""
VALUES = 3_000_000
"""Commas in a JSON document: caps the number of Python objects. A graph file has one comma per 32 bytes."""
NAME_LENGTH = 512
"""Characters in the name of a tensor, module or graph node."""
RANKS = 4096
"""Tensor-parallel ranks that a manifest may name."""
ONNX_BYTES = 1 << 31
"""A model.onnx with external weights; protobuf's own limit."""

NODES = 1 << 20
"""Nodes, parameters or recipes in a graph file, and tensors named by any one of them."""
RANK = 16
"""Dimensions of a graph tensor."""
SIZE = 1 << 40
"""Any single size, and any number that a graph computes from sizes."""
PIECES = 4096
"""Tensors returned by one graph call."""
VALUE_BYTES = 1 << 29
"""Bytes of all live graph values at any time, for two sequences of 12 tokens; or four times the largest parameter in
float32, if that is more."""
BATCH_BYTES = 1 << 45
"""Bytes of one graph call for a million tokens, 1013 per sequence: values must grow about linearly with tokens."""

CONFIG_BYTES = 16 * MIB
"""A config.json, a tokenizer_config.json, a policy, a chat template."""
INDEX_BYTES = 128 * MIB
"""An index or a description: one line per tensor."""
GRAPH_BYTES = 256 * MIB
"""A graph, a ledger or a manifest: a few lines per tensor."""
HEADER_BYTES = 100_000_000
"""The header of a safetensors file; the format's own limit (safetensors, MAX_HEADER_SIZE)."""
TENSORS = 250_000
"""Tensors in one safetensors file; the largest public models have about 150 thousand in all files together."""
DIMENSIONS = 16
"""Dimensions of a stored tensor."""
CHECKPOINT_TENSORS = 400_000
"""Tensors in all files of a checkpoint together."""
FILE_NAME_BYTES = 255
"""A file name without its folder; the usual file system limit."""

TEXT_BYTES = 64 * MIB
"""A .json of texts, or one line of a .jsonl. A .txt or .jsonl file may be larger: only the needed part is read."""
PIECE_CHARACTERS = 1 << 20
"""Characters tokenized at a time."""
TOKEN_ID_BYTES = 512 * MIB
"""A .npy or .safetensors of token ids."""
TOKENIZER_BYTES = 128 * MIB
"""A tokenizer.json; DeepSeek-V3's is 8 MB."""
TOKENIZER_MEMORY = 1920 * MIB
"""Memory of the tokenizer process; the library takes about 400 bytes per token."""
TOKENIZER_SECONDS = 3
"""CPU seconds to open a small tokenizer, plus the same again per 8 MiB of file."""
TEXT_SECONDS = 3
"""CPU seconds to render a chat or tokenize a short text."""
WALL = 2
"""Wall-clock limit of tokenizers and templates, as a multiple of their CPU limit: the machine may be busy."""
TEMPLATE_MEMORY = 256 * MIB
"""Memory of the chat template process."""

OUTPUT_BYTES = 64 << 10
"""Tail of the output that is kept from a model.py or another child process."""
ANSWER_BYTES = 512 * MIB
"""Result of a model.py process: its graph as text."""

POLICY_BYTES = MIB >> 2
"""A policy file: enough for thousands of rules."""
POLICY_VALUES = 20_000
"""Scalars, lists and mappings in a policy file; an alias counts in full wherever it is used."""
POLICY_DEPTH = 16
"""Policies in one `extends` chain."""

LAYERS = 512
"""Decoder layers."""
EXPERTS = 8192
"""Routed experts per layer."""
ALL_EXPERTS = 1 << 16
"""Routed experts in all layers together, four times DeepSeek-V3's: each is three tensors to name and place."""
MTP_LAYERS = 16
"""Multi-token prediction layers."""
HEADS = 1 << 14
"""Attention heads."""
WIDTH = 1 << 22
"""A width in features, or a vocabulary."""
POSITIONS = 1 << 40
"""Positions of a context."""
PARAMETERS = 10**15
"""Parameters of a model: a thousand times the largest open ones."""
