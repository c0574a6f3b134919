"""XXH3-128, in hexadecimal: fast enough to take while bytes are in the cache. It finds damage, not forgery.

XXH3 by Yann Collet, https://github.com/Cyan4973/xxHash; canonical (big-endian) form.
"""

import xxhash


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_text(text: str) -> str:
    """Of the text in UTF-8."""
    return hash_bytes(text.encode())
