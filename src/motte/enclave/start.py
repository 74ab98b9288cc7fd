"""First program of an image: reads all packed bytecode at once, then becomes the worker. Runs only inside of an image.

Why packed: an enclave hashes a file whenever it is opened, so three hundred small files cost more than one of the same
bytes, which is opened once. Members are complete ``.pyc`` files in the unchecked form (PEP 552): what an enclave has
hashed need not be checked against a source that is not there. Each is compressed (RFC 1950): bytecode shrinks to two
fifths, and expanding what is imported takes a tenth of the time that hashing the difference would.

Layout of the pack: magic ``MOTTEPK2``, length of the index u32 (big-endian), the index, the members one after another.
The index is text: for each member its path below the folder of the modules, a tab, its compressed size in bytes, a line
end.

Nothing is imported here that is not part of the interpreter, or of :data:`FIRST`: each would be one more file. Only
``zlib`` is, which whoever lists what an image needs has therefore imported too.
"""

import os
import sys
import zlib
from importlib.machinery import ModuleSpec, SourcelessFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

MAGIC = b"MOTTEPK2"
PACK_NAME = "modules.pack"
START_NAME = "motte_start.pyc"
FIRST = ("encodings", "encodings.aliases", "encodings.utf_8", "importlib", "warnings")
"""Modules that Python, or this file, needs before the pack is read: they stay files of their own."""


class PackedLoader(SourcelessFileLoader):
    """Loads one member, whose ``code`` and ``source`` are still compressed."""

    def __init__(self, fullname: str, path: str, code: memoryview, source: "memoryview | None") -> None:
        super().__init__(fullname, path)
        self._code = code
        self._source = source

    def get_data(self, path: str) -> bytes:
        """The member's bytes; packages also read data files of theirs this way."""
        if path != self.path:
            return super().get_data(path)
        return zlib.decompress(self._code)

    def get_source(self, fullname: str) -> "str | None":  # type: ignore[override]  # typeshed: a sourceless one has none
        """Its source, for the few modules that read their own; None for all others."""
        return None if self._source is None else zlib.decompress(self._source).decode()

    def exec_module(self, module: "ModuleType") -> None:
        """Run it. Its ``__file__`` is where it would lie, since packages look for their libraries beside it."""
        module.__file__ = str(self.path)
        super().exec_module(module)


class PackedFinder:
    """Finds the members of one pack, which lies in the folder of the modules."""

    def __init__(self, folder: str, members: "Mapping[str, memoryview]") -> None:
        self._folder = folder
        self._members = members

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """See :class:`importlib.abc.MetaPathFinder`."""
        place = fullname.replace(".", "/")
        for member, folders in ((f"{place}/__init__.pyc", [f"{self._folder}/{place}"]), (f"{place}.pyc", None)):
            if member not in self._members:
                continue
            location = f"{self._folder}/{member}"
            source = self._members.get(member.removesuffix("c"))
            loader = PackedLoader(fullname, location, self._members[member], source)
            # The origin is the file that was read, for whoever lists what a process has loaded.
            spec = ModuleSpec(fullname, loader, origin=f"{self._folder}/{PACK_NAME}", is_package=folders is not None)
            spec.submodule_search_locations = folders
            spec.has_location = True
            return spec
        return None


def read_pack(data: memoryview) -> dict[str, memoryview]:
    """Path -> member, compressed.

    Raises:
        ValueError: not a pack, or one that was cut.
    """
    start = len(MAGIC) + 4
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("not a pack of modules")
    place = start + int.from_bytes(data[len(MAGIC) : start], "big")
    members = {}
    for line in bytes(data[start:place]).decode().splitlines():
        path, _, size = line.partition("\t")
        members[path] = data[place : place + int(size)]
        place += int(size)
    if place != len(data):
        raise ValueError("a pack of another length than its index says")
    return members


def main(words: list[str]) -> None:
    """Install the finder, then become the worker, or with ``-m`` another module, with the arguments ``words``."""
    module = "motte.trusted"
    if words[:1] == ["-m"]:
        module, words = words[1], words[2:]
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(f"{folder}/{PACK_NAME}", "rb") as file:
        members = read_pack(memoryview(file.read()))
    sys.path[:] = [folder, f"{folder}/lib-dynload"]
    # Before the finder of files, behind those of the interpreter's own modules: no file can come in a member's place.
    sys.meta_path.insert(2, PackedFinder(folder, members))
    sys.argv = [module, *words]
    import runpy

    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
