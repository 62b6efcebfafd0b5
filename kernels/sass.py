"""Counts machine instructions in Triton's disassembly."""

import re


def count_sass(text: str) -> tuple[int, int, int]:
    r"""Counts instructions, waits for wgmma and exponentials among them, in Triton's disassembly; NOP does not count.

    >>> count_sass("--:-:-:Y:1\t@!P0 BRA 0x10;\n01:-:0:-:4\tWARPGROUP.DEPBAR.LE gsb0, 0x0;\n--:-:-:Y:0\tNOP;")
    (2, 1, 0)
    """
    names = re.findall(r"^[\w:-]+\t(?:@\S+ )?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    kept = [name for name in names if name != "NOP"]
    waits, exponentials = (sum(name.startswith(of) for name in kept) for of in ("WARPGROUP.DEPBAR", "MUFU.EX2"))
    return len(kept), waits, exponentials


def longest_loop(text: str) -> int:
    r"""Counts the machine instructions of the longest loop in Triton's disassembly.

    A loop is what runs between a place that every way into it passes and a jump back to that place (a natural loop: Aho
    et al. 2006, section 9.6.6). Code for rare cases that stands behind the program and jumps back into it makes none.

    >>> longest_loop("LBB0:\n--:-:-:Y:1\tMUFU.EX2 R1, R2;\n--:-:-:Y:1\t@P0 BRA LBB0;")
    2
    """
    lines = [line for line in text.splitlines() if re.fullmatch(r"\w+:", line) or re.match(r"[\w:-]+\t", line)]
    labels = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    instructions = [place for place, line in enumerate(lines) if not line.endswith(":")]
    labels |= {f"0x{16 * number:x}": place for number, place in enumerate(instructions)}  # where a jump has no label
    after: list[list[int]] = []  # where each line goes on
    for place, line in enumerate(lines):
        # BRA.DIV is for a warp whose threads have parted: a rare case
        jump = None if "BRA.DIV" in line else re.search(r"\bBRA(?:\.\w+)* (?:\S+, )?(\w+);", line)
        always = re.search(r"\t(BRA \w+;|EXIT|RET)", line)
        targets = [labels[jump[1]]] if jump and jump[1] in labels else []
        after.append(targets if always else [*targets, *([place + 1] if place + 1 < len(lines) else [])])
    seen = _reached(0, after)
    before: list[list[int]] = [[] for _ in lines]
    for place in seen:
        for target in after[place]:
            before[target].append(place)
    longest = 0
    for place in seen:
        for head in after[place]:
            if head < place and place not in _reached(0, after, without=head):
                body = {head} | _reached(place, before, without=head)
                longest = max(longest, count_sass("\n".join(lines[each] for each in body))[0])
    return longest if longest > 1 else 0  # each program ends in a jump to itself


def _reached(start: int, edges: list[list[int]], without: int = -1) -> set[int]:
    """The places to which edges lead from `start`, itself among them, on ways that do not pass `without`."""
    seen: set[int] = set()
    left = [start]
    while left:
        place = left.pop()
        if place not in seen and place != without:
            seen.add(place)
            left += edges[place]
    return seen
