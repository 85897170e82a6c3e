"""What a compiled kernel stores, element by element, as expressions over what it loads: read from its PTX.

An expression names the products that round on their own, ``mul(p, x)``, and those that a multiply-add does not round,
the first two of ``fma(q, output, mul(p, x))``.
"""

import itertools
import re

INSTRUCTION = re.compile(r"(?:@!?%p\d+\s+)?([a-z][\w.:]+)\s+(.+);")
OPERAND = re.compile(r"%\w+|0[fd][0-9A-F]+|-?\d+")
COLUMNS = "a", "p", "q", "g"  # of a row of weights; the rest are w
NUMBERS = {"0f3F800000": "1", "0d3FF0000000000000": "1"}
ARITHMETIC = re.compile(r"(fma|mul|add|sub)(\.rn)?\.f(32|64)")
COPIES = re.compile(r"(cvt|mov|selp|shfl|prmt|shr|shl|and|or)\.")  # an element's bits, moved or widened
ADDRESSES = re.compile(r"(add|sub|mad|shl|mul)\.(lo\.|wide\.)?[su]64|mad\.wide|cvta")


def stored(ptx, parameters, wide):
    """For each parameter that is written through, the expressions of its elements, sorted.

    parameters: names in the kernel's order. wide: bytes of a weight. A loop counts as its body, once; what is added
    slot after slot, or over lanes, as what is added last.
    """
    reader = Reader(parameters, wide)
    for line in ptx.splitlines():
        if matched := INSTRUCTION.match(line.strip()):
            reader.read(*matched.groups())
    return {name: sorted(elements) for name, elements in reader.found.items()}


class Reader:
    """What the registers hold after the instructions read so far.

    values: for each register a set of expressions, since it may hold two halves, or the result of either branch.
    addresses: the parameter and the constant offset of those that point. shared: what is in shared memory.
    """

    def __init__(self, parameters, wide):
        self.parameters, self.wide = parameters, wide
        self.values, self.addresses, self.found = {}, {}, {}
        self.shared, self.shared_was_read = set(), False

    def read(self, name, rest):
        to, _, source = rest.partition("], " if name.startswith("st") else "}, " if rest.startswith("{") else ", ")
        targets, operands = OPERAND.findall(to), OPERAND.findall(source)
        if name.startswith("ld.param"):
            at = int(re.search(r"_param_(\d+)", source)[1])
            if name.endswith(("b64", "u64")) and at < len(self.parameters):
                self.addresses[targets[0]] = self.parameters[at], 0
        elif name.startswith("ld"):
            self.values |= dict.fromkeys(targets, self.load(name, operands))
        elif name.startswith("st"):
            self.store(name, targets, set().union(*map(self.value, operands)))
        elif arithmetic := ARITHMETIC.match(name):
            each = itertools.product(*map(self.value, operands))
            self.values[targets[0]] = {written(arithmetic[1], *one) for one in each}
        elif ADDRESSES.match(name):
            for base, offset in [self.addresses[o] for o in operands if o in self.addresses][:1]:
                constant = name.startswith("add") and operands[-1].lstrip("-").isdigit()
                self.addresses[targets[0]] = base, offset + int(operands[-1] if constant else 0)
        elif COPIES.match(name):
            held = set().union(*map(self.value, operands)) - {"0"}
            self.values |= dict.fromkeys(targets, held or {"0"})

    def value(self, operand):
        return self.values.get(operand) or {NUMBERS.get(operand, "0")}

    def load(self, name, operands):
        if ".shared" in name:
            self.shared_was_read = True
            return set(self.shared)
        base, offset = self.addresses[operands[0]]
        if base == "weights":
            column = (offset + sum(map(int, operands[1:]))) // self.wide
            return {COLUMNS[column] if column < len(COLUMNS) else "w"}
        return {base}

    def store(self, name, address, elements):
        if ".shared" in name:
            self.shared = elements if self.shared_was_read else self.shared | elements
            self.shared_was_read = False
        else:
            self.found.setdefault(self.addresses[address[0]][0], set()).update(elements)


def written(operation, one, two, rest=None):
    if operation in ("fma", "mul"):
        one, two = sorted((one, two))
    if operation == "add" and one == two:
        return one
    if operation == "fma" and rest.startswith(f"fma({one}, {two}, "):
        return rest
    return f"{operation}({one}, {two}{'' if rest is None else f', {rest}'})"
