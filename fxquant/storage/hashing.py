"""XXH3-128 hashes in hexadecimal: cheap enough to compute while bytes are in cache. They detect damage, not forgery.

XXH3 by Yann Collet, https://github.com/Cyan4973/xxHash; canonical (big-endian) form.
"""

import xxhash


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """XXH3-128 of `data`: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_text(text: str) -> str:
    """XXH3-128 of `text` in UTF-8."""
    return hash_bytes(text.encode())
