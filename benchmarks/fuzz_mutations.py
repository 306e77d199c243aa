"""Ways to damage bytes: blindly, and as a tar, a JSON text or an image, with checksums made right again."""

# ruff: noqa: ARG001 - all mutations take the same arguments
from __future__ import annotations

import itertools
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence

Mutation = Callable[[bytes, random.Random, bytes], bytes]
"""From some bytes, a source of chance and other bytes of the same kind to damaged bytes."""

_BLOCK = tarfile.BLOCKSIZE
_LENGTHS = (0, 1, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _span(data: bytes, random_: random.Random, longest: int = 600) -> slice:
    start = random_.randrange(len(data) + 1)
    return slice(start, start + random_.randint(1, longest))


# ---- blind


def flip_bit(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Turn one bit."""
    if not data:
        return data
    place = random_.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """End early."""
    return data[: random_.randrange(len(data) + 1)]


def remove(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Take a piece out."""
    span = _span(data, random_)
    return data[: span.start] + data[span.stop :]


def insert(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Put a piece in: of the other bytes, of these, or zeros."""
    place = random_.randrange(len(data) + 1)
    source = random_.choice((other, data, bytes(600)))
    return data[:place] + source[_span(source, random_)] + data[place:]


def splice(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Go on with the other bytes."""
    return data[: random_.randrange(len(data) + 1)] + other[random_.randrange(len(other) + 1) :]


def move_block(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Move, repeat or remove a block of 512 bytes."""
    blocks = [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]
    if not blocks:
        return data
    block = random_.choice(blocks) if random_.random() < 0.3 else blocks.pop(random_.randrange(len(blocks)))
    if random_.random() < 0.7:
        blocks.insert(random_.randrange(len(blocks) + 1), block)
    return b"".join(blocks)


BLIND: tuple[Mutation, ...] = (flip_bit, flip_bit, cut, remove, insert, splice, move_block)
"""Mutations that know nothing of what the bytes mean."""


# ---- tar

_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
    "sparse": (386, 97),
}
_NAMES = (
    b"000001.json",
    b"000001.image.png",
    b"./000001.json",
    b"000000.json\0x",
    b"a/b.json",
    b"../a.json",
    b"a.b.json",
    b"k.retrieved.webp",
    b"\xff.json",
    b"",
    b"x" * 100,
)
_SIZES = (
    b"0",
    b"1",
    b"777",
    b"1000",
    b"-1",
    b"77777777777",
    b"\x80" + b"\xff" * 11,
    b"\x80" + bytes(10) + b"\x02",
    b"x",
)
_MAGICS = (b"ustar\x0000", b"ustar  \0", bytes(8), b"ustar\0  ")
_PAX = (
    b"path=000001.json",
    b"size=3",
    b"size=99999999999",
    b"size=-512",
    b"size=x",
    b"mtime=nan",
    b"hdrcharset=BINARY",
    b"GNU.sparse.map=0,10",
    b"GNU.sparse.size=10",
    b"GNU.sparse.major=1",
    b"GNU.sparse.minor=0",
    b"GNU.sparse.name=000001.json",
    b"linkpath=/etc/passwd",
    b"comment=\xff",
)


def with_checksum(header: bytes) -> bytes:
    """A tar header whose checksum is right.

    Args:
        header: 512 bytes.
    """
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def tar_pieces(data: bytes) -> list[bytes]:
    """A tar cut before every block that is a header: a member each, with its contents.

    Args:
        data: the tar.
    """
    starts = [start for start in range(0, len(data), _BLOCK) if _is_header(data[start : start + _BLOCK])]
    borders = [0, *starts, len(data)]
    return [data[one:two] for one, two in itertools.pairwise(borders) if two > one]


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _field_value(name: str, random_: random.Random) -> bytes:
    if name == "name":
        return random_.choice(_NAMES)
    if name == "size":
        return random_.choice(_SIZES)
    if name == "type":
        return random_.choice((b"\0", *(b"%c" % kind for kind in b"01234567gxXLKSVDNA")))
    if name == "magic":
        return random_.choice(_MAGICS)
    return random_.choice((b"", b"0", b"-1", b"\xff" * 12, b"7" * 11, b"../x", random_.randbytes(12)))


def edit_tar_header(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Change one field of one header; its checksum is made right, mostly."""
    pieces = tar_pieces(data)
    if not pieces:
        return data
    place = random_.randrange(len(pieces))
    name = random_.choice([*_FIELDS, "name", "size", "type"])
    start, length = _FIELDS[name]
    value = _field_value(name, random_)[:length].ljust(length, b"\0")
    header = pieces[place][:start] + value + pieces[place][start + length : _BLOCK]
    if random_.random() < 0.9 and len(header) == _BLOCK:
        header = with_checksum(header)
    pieces[place] = header + pieces[place][_BLOCK:]
    return b"".join(pieces)


def shuffle_members(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Swap, repeat, remove or borrow a whole member."""
    pieces = tar_pieces(data)
    if not pieces:
        return data
    place, target = random_.randrange(len(pieces)), random_.randrange(len(pieces))
    kind = random_.randrange(4)
    if kind == 0:
        pieces[place], pieces[target] = pieces[target], pieces[place]
    elif kind == 1:
        pieces.insert(target, pieces[place])
    elif kind == 2:
        del pieces[place]
    else:
        pieces.insert(target, random_.choice(tar_pieces(other) or [b""]))
    return b"".join(pieces)


def _extension(random_: random.Random) -> bytes:
    """A header that changes the meaning of the next one: PAX records, a long name, or zero blocks."""
    kind = random_.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b""))
    if not kind:
        return bytes(_BLOCK * random_.randint(1, 3))
    if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE):
        body = b"".join(_pax_record(random_) for _ in range(random_.randint(1, 3)))
    else:
        body = random_.choice(_NAMES) + b"\0"
    info = tarfile.TarInfo("extension")
    info.type, info.size = kind, len(body) + random_.choice((0, 0, 0, 1, -1, 512))
    header: bytes = info.tobuf(tarfile.GNU_FORMAT)
    return header + body.ljust(-(-len(body) // _BLOCK) * _BLOCK, b"\0")


def _pax_record(random_: random.Random) -> bytes:
    record = b" " + random_.choice(_PAX) + b"\n"
    length = len(record) + len(str(len(record) + 2))
    return b"%d" % (length + random_.choice((0, 0, 0, 0, 1, -1, 10_000))) + record


def insert_tar_extension(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Put an extension header or zero blocks before a member."""
    pieces = tar_pieces(data)
    pieces.insert(random_.randrange(len(pieces) + 1), _extension(random_))
    return b"".join(pieces)


def mutate_member(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Damage the contents of one member, as JSON or an image; sizes and checksums are made right."""
    pieces = tar_pieces(data)
    places = [place for place, piece in enumerate(pieces) if _is_header(piece[:_BLOCK])]
    if not places:
        return data
    place = random_.choice(places)
    header = tarfile.TarInfo.frombuf(pieces[place][:_BLOCK], "utf-8", "surrogateescape")
    # Anything may stand in the field, also what no file can have.
    size = min(max(header.size, 0), len(pieces[place]) - _BLOCK)
    body, rest = pieces[place][_BLOCK : _BLOCK + size], pieces[place][_BLOCK + -(-size // _BLOCK) * _BLOCK :]
    body = random_.choice(JSON if body[:1] == b"{" else IMAGE)(body, random_, body)
    start, length = _FIELDS["size"]
    new_header = pieces[place][:start] + (b"%011o\0" % len(body)) + pieces[place][start + length : _BLOCK]
    pieces[place] = with_checksum(new_header) + body + bytes(-len(body) % _BLOCK) + rest
    return b"".join(pieces)


TAR: tuple[Mutation, ...] = (
    *BLIND,
    edit_tar_header,
    edit_tar_header,
    edit_tar_header,
    shuffle_members,
    insert_tar_extension,
    insert_tar_extension,
    mutate_member,
    mutate_member,
)
"""Mutations of tars."""


# ---- JSON

_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[a-zA-Z]+|[][{},:]|\s+', re.DOTALL)
_VALUES = (
    b"null",
    b"true",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-0",
    b"1.5",
    b"1" * 5000,
    b"1" * 400,
    b'""',
    b'" "',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\\ud83d\\udc31"',
    b'"<image>"',
    b'"a/../../b.jpg"',
    b'"http://x/a.jpg"',
    b'"{}"',
    b'"\xff"',
    b"[]",
    b"{}",
    b"[" * 300 + b"]" * 300,
    b"[" * 600 + b"]" * 600,
    b"[" * 960 + b"]" * 960,
    b'{"a":' * 400 + b"1" + b"}" * 400,
    b"[" * 3000 + b"]" * 3000,
    b"[[]]",
    b"]",
    b"}",
    b"\\",
    b'"',
)


def edit_json(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Replace, remove, repeat, swap or borrow a token."""
    tokens = _JSON_TOKEN.findall(data)
    if not tokens:
        return random_.choice(_VALUES)
    place, target = random_.randrange(len(tokens)), random_.randrange(len(tokens))
    kind = random_.randrange(6)
    if kind == 0:
        tokens[place] = random_.choice(_VALUES)
    elif kind == 1:
        del tokens[place]
    elif kind == 2:
        tokens.insert(target, tokens[place])
    elif kind == 3:
        tokens[place], tokens[target] = tokens[target], tokens[place]
    elif kind == 4:
        tokens[place] = random_.choice(_JSON_TOKEN.findall(other) or [b""])
    else:
        first, last = sorted((place, target))
        tokens[last:last] = [*tokens[first:last], random_.choice((b"", b",", b":"))]
    return b"".join(tokens)


def recode_text(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Write the text in another encoding, with a mark, or with other line ends."""
    text = data.decode("utf-8", "replace")
    return random_.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-8-sig"),
            text.encode("latin-1", "replace"),
            data.replace(b"\n", b"\r\n"),
            data.replace(b"\n", b"\r"),
            data.replace(b"\n", b""),
            data + b"\n" + data,
            data + other,
        )
    )


def edit_value(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Put a strange value in the place of a string or a number."""
    places = [match.span() for match in _JSON_TOKEN.finditer(data) if match.group()[:1] not in b"[]{},: \n"]
    if not places:
        return data
    start, stop = random_.choice(places)
    return data[:start] + random_.choice(_VALUES) + data[stop:]


JSON: tuple[Mutation, ...] = (*BLIND, edit_json, edit_json, edit_json, edit_value, edit_value, recode_text)
"""Mutations of JSON texts and lines."""


# ---- images


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def _png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    packed = (struct.pack(">I", len(body)) + kind + body + _crc(kind + body) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def _extra_chunk(random_: random.Random) -> tuple[bytes, bytes]:
    kind = random_.choice((b"tRNS", b"eXIf", b"acTL", b"fcTL", b"gAMA", b"iCCP", b"PLTE", b"zTXt", b"iTXt", b"IDAT"))
    bomb = b"x\0\0" + zlib.compress(bytes(random_.choice((10, 5_000_000))))
    return kind, random_.choice((b"", bytes(2), bytes(8), random_.randbytes(26), _exif(random_)[6:], bomb))


def edit_png(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Change a PNG chunk by chunk; their checksums are made right."""
    chunks = _png_chunks(data)
    if not chunks:
        return data
    place, target = random_.randrange(len(chunks)), random_.randrange(len(chunks))
    kind = random_.randrange(6)
    name, body = chunks[place]
    if kind == 0 and chunks[0][0] == b"IHDR":
        chunks[0] = (b"IHDR", _strange_bytes(chunks[0][1], random_))
    elif kind == 1:
        chunks[place] = (name, _strange_bytes(body, random_))
    elif kind == 2:
        del chunks[place]
    elif kind == 3:
        chunks.insert(target, chunks[place])
    elif kind == 4:
        chunks[place], chunks[target] = chunks[target], chunks[place]
    else:
        chunks.insert(target, _extra_chunk(random_))
    return _png(chunks)


def _strange_bytes(data: bytes, random_: random.Random) -> bytes:
    if not data:
        return data
    place = random_.randrange(len(data))
    value = random_.choice(_LENGTHS)
    width = random_.choice((1, 2, 4))
    packed = (value & (1 << 8 * width) - 1).to_bytes(width, random_.choice(("big", "little")))
    return data[:place] + packed + data[place + width :]


def _exif(random_: random.Random) -> bytes:
    """EXIF with an orientation, sometimes of another type or with offsets that lead nowhere."""
    order, mark = random_.choice((("<", b"II"), (">", b"MM")))
    kind, count = random_.choice(((3, 1), (3, 1), (3, 1), (2, 1), (4, 1), (5, 1), (7, 4), (12, 1), (3, 3)))
    value = random_.choice((1, 3, 6, 8, 9, 0, 0xFFFF))
    entry = struct.pack(f"{order}HHIHH", 0x0112, kind, count, value, 0)
    count_of_entries = random_.choice((1, 1, 1, 2, 0xFFFF))
    following = random_.choice((0, 0, 8, 0xFFFFFFFF))
    body = mark + struct.pack(f"{order}HIH", 42, 8, count_of_entries) + entry + struct.pack(f"{order}I", following)
    return b"Exif\0\0" + body


def edit_jpeg(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Change bytes of a segment, or put in one: EXIF, several pictures (MPF), ICC, a comment, a second scan."""
    starts = [match.start() for match in re.finditer(rb"\xff[\xc0-\xfe]", data)]
    if not starts:
        return data
    start = random_.choice(starts)
    if random_.random() < 0.5:
        return data[: start + 2] + _strange_bytes(data[start + 2 : start + 40], random_) + data[start + 40 :]
    marker, body = random_.choice(
        (
            (0xE1, _exif(random_)),
            (0xE2, b"MPF\0" + _exif(random_)[6:]),
            (0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(9)),
            (0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([random_.randrange(4)])),
            (0xFE, b"a comment"),
            (0xED, b"Photoshop 3.0\0008BIM\x03\xed\0\0\0\0\0\x10" + random_.randbytes(16)),
        )
    )
    segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    return data[:2] + segment + data[2:]


def edit_webp(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Change bytes of the headers of a WebP, or put in a chunk; the whole length is made right."""
    if data[8:12] != b"WEBP":
        return data
    chunk = random_.choice((b"EXIF", b"ANIM", b"ANMF", b"ALPH", b"ICCP", b"VP8X", b"VP8 "))
    body = random_.choice((_exif(random_)[6:], bytes(10), random_.randbytes(24), b"\x08" + bytes(9)))
    extra = chunk + struct.pack("<I", len(body)) + body
    place = random_.choice((12, len(data)))
    content = data[:place] + extra + data[place:] if random_.random() < 0.5 else _strange_head(data, random_)
    return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]


def _strange_head(data: bytes, random_: random.Random) -> bytes:
    return data[:12] + _strange_bytes(data[12:48], random_) + data[48:]


def edit_image(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Change an image in the way of its format."""
    if data[:4] == b"\x89PNG":
        return edit_png(data, random_, other)
    return (edit_webp if data[:4] == b"RIFF" else edit_jpeg)(data, random_, other)


IMAGE: tuple[Mutation, ...] = (*BLIND, edit_image, edit_image, edit_image, edit_image, edit_image, edit_image)
"""Mutations of images."""


# ---- tables of cells

_CELLS = (b'"', b'""', b",", b"\n", b"\r", b"\0", b'"a\nb"', b"\xff", b"\t", b"a" * 140_000, b"=1+1")


def edit_cells(data: bytes, random_: random.Random, other: bytes) -> bytes:
    """Put quotes, commas, line ends and the like into a CSV."""
    place = random_.randrange(len(data) + 1)
    return data[:place] + random_.choice(_CELLS) + data[place + random_.choice((0, 0, 1)) :]


CELLS: tuple[Mutation, ...] = (*BLIND, edit_cells, edit_cells, edit_cells, recode_text)
"""Mutations of CSV files."""
