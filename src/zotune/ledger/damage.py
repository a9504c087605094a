"""Telling a file that is damaged in the middle from one with a torn tail: by whether a good record follows.

Behind bytes that were lost or inserted, records lie at other places, and after lost records at other numbers. A
record's checksum covers its number, so each place would have to be tried with each number. But CRC-32 is affine in its
initial value: over n bytes, crc(body, initial) = crc(body, 0) ^ crc(zeros, initial) ^ crc(zeros, 0). So one checksum a
place is enough, and its difference to the stored one is looked up among those of all numbers.
"""

from __future__ import annotations

import zlib

# How far behind the damage a record may begin at any place, and how many records may be missing there.
MAX_PLACES = 1 << 20
MAX_MISSING = 1 << 12
# A match of 32 bits is believed if fewer than one file in so many would hold it by chance; else two in a row are asked.
_ONE_IN = 1 << 13


def has_good_record(rest: memoryview, size: int, num_good: int, header_crc: int) -> bool:
    """Whether what follows the last good record of a ledger holds a good record.

    Args:
        rest: the bytes after the last good record.
        size: of a record.
        num_good: the number of good records before them.
        header_crc: the header's checksum.
    """
    num_whole = len(rest) // size
    if not num_whole:
        return False
    numbers = _numbers_by_difference(size, num_good, num_good + num_whole + MAX_MISSING, header_crc)

    def number_at(place: int) -> int | None:
        return numbers.get(_difference(rest, place, size))

    # Bytes that were overwritten leave the records behind them at their own places.
    if any(number_at(i * size) == num_good + i for i in range(1, num_whole)):
        return True
    last = len(rest) - size
    num_places = min(last + 1, MAX_PLACES)
    # Where no record is missing, few numbers are possible at a place, and fewer chance matches.
    is_sure = num_places * len(numbers) * _ONE_IN < 1 << 32
    is_sure_if_none_is_missing = num_places * (num_places // size + 2) * _ONE_IN < 1 << 33
    for place in range(num_places):
        if (number := number_at(place)) is None:
            continue
        if is_sure or (is_sure_if_none_is_missing and number - num_good <= place // size + 1):
            return True
        if place + size <= last and number_at(place + size) == number + 1:
            return True
    return False


def _difference(rest: memoryview, place: int, size: int) -> int:
    """The difference between the stored checksum of the bytes at a place and that of a record of number 0."""
    return int.from_bytes(rest[place : place + 4], "little") ^ zlib.crc32(rest[place + 4 : place + size])


def _numbers_by_difference(size: int, first: int, last: int, header_crc: int) -> dict[int, int]:
    zeros = bytes(size - 4)
    base = zlib.crc32(zeros)
    return {
        base ^ zlib.crc32(zeros, zlib.crc32(number.to_bytes(8, "little"), header_crc)): number
        for number in range(first, last)
    }
