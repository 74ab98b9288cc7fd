"""The public sets: where they are published, the SHA-256 of every file, and finding or fetching them.

The digests of the archives are those that TensorFlow Datasets publishes (``url_checksums/*.txt``); the digests of what
is inside Fashion-MNIST's files were computed from Debian's package ``dataset-fashion-mnist``, whose files are packed
anew and hold the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from motte.errors import InputError, ResourceError, TrustError
from motte.zoo import download

_HINT: Final = "use --data-dir FOLDER with files that you have"
AS_PUBLISHED: Final = "the published bytes"
OTHER_BYTES: Final = "NOT the published bytes"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file of a set.

    ``sha256`` is of the file as it is downloaded; ``content_sha256`` of what is in a ``.gz``, where it is known.
    """

    name: str
    bytes: int
    sha256: str
    content_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """A public data set.

    Attributes:
        mirrors: addresses of folders, each ending in a slash, in the order in which they are asked.
        folders: where the files may lie below a ``--data-dir``.
        system_folder: where a package of the operating system puts them.
        mean, std: per channel, of pixels in [0, 1], over the training images; as everybody uses them.
        padding, flip: the augmentation; digits are not mirrored.
    """

    mirrors: tuple[str, ...]
    folders: tuple[str, ...]
    files: tuple[PublishedFile, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    system_folder: Path | None = None


_FASHION: Final = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100: Final = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)  # fmt: skip
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

SETS: Final[Mapping[str, PublishedSet]] = {
    "fashion-mnist": PublishedSet(
        mirrors=(
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            "https://ossci-datasets.s3.amazonaws.com/fashion-mnist/",
        ),
        folders=("", "fashion-mnist", "FashionMNIST/raw"),
        files=(
            PublishedFile(
                "train-images-idx3-ubyte.gz",
                26421880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            ),
            PublishedFile(
                "train-labels-idx1-ubyte.gz",
                29515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            ),
            PublishedFile(
                "t10k-images-idx3-ubyte.gz",
                4422102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            ),
            PublishedFile(
                "t10k-labels-idx1-ubyte.gz",
                5148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        ),
        classes=_FASHION,
        mean=(0.2860,),
        std=(0.3530,),
        padding=2,
        flip=True,
        system_folder=Path("/usr/share/datasets/fashion-mnist"),
    ),
    "mnist": PublishedSet(
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        folders=("", "mnist", "MNIST/raw"),
        files=(
            PublishedFile(
                "train-images-idx3-ubyte.gz",
                9912422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            PublishedFile(
                "train-labels-idx1-ubyte.gz",
                28881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            PublishedFile(
                "t10k-images-idx3-ubyte.gz",
                1648877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            PublishedFile(
                "t10k-labels-idx1-ubyte.gz",
                4542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        classes=tuple("0123456789"),
        mean=(0.1307,),
        std=(0.3081,),
        padding=2,
        flip=False,
    ),
    "cifar10": PublishedSet(
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
        folders=("", "cifar10"),
        files=(
            PublishedFile(
                "cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        classes=_CIFAR10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        padding=4,
        flip=True,
    ),
    "cifar100": PublishedSet(
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
        folders=("", "cifar100"),
        files=(
            PublishedFile(
                "cifar-100-binary.tar.gz",
                168513733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        classes=_CIFAR100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        padding=4,
        flip=True,
    ),
}


def cache_folder(name: str) -> Path:
    """Where the files of a downloaded set lie: beside the cached weights."""
    return download.cache_folder().parent / "data" / name


@dataclass(frozen=True, slots=True)
class Located:
    """The folder that holds every file of a set; ``checked``: their digests were compared on the way."""

    folder: Path
    checked: bool


def locate(name: str, data_dir: Path | None, *, progress: download.Progress | None = None) -> Located:
    """Find the files of a set: below ``data_dir``, of the system, or in the cache, which is filled if need be.

    Raises:
        InputError: ``data_dir`` does not hold them all; nothing is downloaded then.
        ResourceError: offline, or no room.
        TrustError: what came, or what the cache holds, has another hash.
    """
    known = SETS[name]
    if data_dir is not None:
        for each in known.folders:
            if _complete(known, data_dir / each):
                return Located(data_dir / each, checked=False)
        raise InputError(
            f"the files of {name} are not all there",
            where=str(data_dir),
            expected=", ".join(file.name for file in known.files),
            hint="without --data-dir they are downloaded",
        )
    if known.system_folder is not None and _complete(known, known.system_folder):
        return Located(known.system_folder, checked=False)
    folder = cache_folder(name)
    for file in known.files:
        path = folder / file.name
        if not path.is_file():
            _fetch(known, file, path, progress)
        elif download.file_sha256(path) != file.sha256:
            raise TrustError(
                "cached data is not what was published", where=str(path), hint="delete the file and try again"
            )
    return Located(folder, checked=True)


def _complete(known: PublishedSet, folder: Path) -> bool:
    return all((folder / file.name).is_file() for file in known.files)


def _fetch(known: PublishedSet, file: PublishedFile, final: Path, progress: download.Progress | None) -> None:
    published = download.Published(f"data ({file.name})", _HINT, file.bytes)
    for mirror in known.mirrors:
        try:
            return download.fetch_known(
                mirror + file.name, final, sha256=file.sha256, published=published, progress=progress
            )
        except ResourceError:
            if mirror == known.mirrors[-1]:
                raise


def provenance(name: str, located: Located, contents: Mapping[str, bytes]) -> str:
    """Whether the files of a set are the published ones, for people.

    Args:
        contents: file name -> its decompressed bytes, where the reader has them.
    """
    known = SETS[name]
    genuine = located.checked or all(_genuine(file, located.folder, contents.get(file.name)) for file in known.files)
    return f"{name} from {located.folder}: {AS_PUBLISHED if genuine else OTHER_BYTES}"


def _genuine(file: PublishedFile, folder: Path, content: bytes | None) -> bool:
    if content is not None and file.content_sha256 is not None:
        return hashlib.sha256(content).hexdigest() == file.content_sha256
    return download.file_sha256(folder / file.name) == file.sha256
