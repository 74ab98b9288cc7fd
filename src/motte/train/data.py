"""Data for training, by name: ``open_data("cifar10", seed=0)``.

=====================  ==============================================================================================
``fashion-mnist``      28 x 28 grey, 10 classes; also read from Debian's ``dataset-fashion-mnist``
``mnist``              28 x 28 grey, 10 digits
``cifar10``            32 x 32 colour, 10 classes, from the binary archive
``cifar100``           32 x 32 colour, 100 fine classes, from the binary archive
``imagenet:PATH``      a folder with ``train/CLASS/*`` and ``val/CLASS/*``; the user's own copy
``folder:PATH``        the same, or one folder of classes that is split by the seed. **Public data only**: the host
                       reads every file of a folder. Private data is sealed first: ``motte seal-data``
``sealed:FILE``        what ``motte seal-data`` wrote, opened with the keys of its owner
=====================  ==============================================================================================

Public sets are downloaded over https into the cache unless ``data_dir`` says where they lie; a download is kept only if
its SHA-256 is the known one. No reader unpickles anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

from motte.errors import SettingError
from motte.limits import GIB
from motte.train.augment import CropFlip, check_seed
from motte.train.datasets import cifar, digits, published
from motte.train.datasets.batches import Batch, Batches
from motte.train.datasets.folder import PHOTO_SIZE, natural_size, read_folder
from motte.train.datasets.records import (
    PHOTO_PADDING,
    ArrayPixels,
    FixedRecords,
    PhotoRecords,
    Records,
    Shape,
    check_image_size,
)
from motte.train.sealed_data import ReleasedKeys, SealedData, open_released, open_sealed

if TYPE_CHECKING:
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
    from motte.zoo.download import Progress

__all__ = ["Batch", "Batches", "DataKeys", "DataSet", "Records", "ReleasedKeys", "open_data"]

PLACED: Final = ("imagenet", "folder", "sealed")
"""Names that are followed by ``:PATH``."""
DEFAULT_MEMORY_BYTES: Final = 1 * GIB
Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class DataKeys:
    """What opens a sealed data file. Secret.

    Args:
        recipient: our private key, to which the file was sealed.
        signer: whose signature is demanded; there is no default, since anyone can seal to a public key.
        min_release: the lowest release accepted.
        verify_digests: compare the whole file with its signed digests first. Without it another recipient of the same
            file could forge records unnoticed.
    """

    recipient: RecipientPrivateKey
    signer: SignerPublicKey
    min_release: int = 0
    verify_digests: bool = False


@dataclass(frozen=True, slots=True)
class DataSet:
    """An opened data set: use it in a ``with`` block, or :meth:`close` it, if it is sealed.

    Attributes:
        train, test: the records of the two splits.
        shape: (C, H, W) of every image.
        mean, std: per channel, of pixel values in [0, 1]; subtracted and divided by in every batch. Never computed from
            the data: a private set must not tell them.
        padding, flip: the augmentation of small images; large photos are cut at random instead.
        private: whether the data must not be seen by the host: true for sealed data only.
        provenance: where it was read from and whether those are the published bytes, one line for people.
    """

    name: str
    train: Records
    test: Records
    classes: tuple[str, ...]
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    private: bool
    seed: int
    provenance: str
    source: SealedData | None = field(default=None, repr=False)

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        epoch: int = 0,
        start: int = 0,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        augment: bool = True,
        drop_last: bool = False,
    ) -> Batches:
        """One pass over a split: ``train`` shuffled and augmented by (seed, epoch), ``test`` in order and as it is.

        Args:
            augment: false leaves training images as they are; the test split never is augmented.
            start, workers, shard, drop_last: as :class:`Batches` has them.

        Raises:
            SettingError: a number out of its range.
        """
        training = split == "train"
        return Batches(
            self.train if training else self.test,
            mean=self.mean,
            std=self.std,
            seed=self.seed,
            epoch=epoch,
            batch_size=batch_size,
            shuffle=training,
            augment=training and augment,
            start=start,
            workers=workers,
            shard=shard,
            drop_last=drop_last,
        )

    def close(self) -> None:
        """Close the files of sealed data and drop their keys; nothing for other data."""
        if self.source is not None:
            self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_data(
    name: str,
    *,
    data_dir: Path | None = None,
    seed: int,
    image_size: int | None = None,
    keys: DataKeys | ReleasedKeys | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
) -> DataSet:
    """Open a data set by name; the module's docstring lists the names.

    Args:
        data_dir: where the files of a public set lie; nothing is downloaded then.
        seed: of the order, the augmentation, and the split of a folder without ``train/``.
        image_size: side of the images that come out. None: the set's own; for photos 224, or their own if they are
            small squares, all alike.
        keys: for sealed data, and for nothing else. :class:`ReleasedKeys` bring their opened file along.
        memory_bytes: records of sealed data held in memory at most.
        progress: of a download, called with bytes done and bytes in all.

    Raises:
        SettingError: an unknown name, or a setting that this data does not take.
        InputError: files that are missing, or do not follow their format.
        ResourceError: offline; the hint names ``--data-dir``.
        TrustError, BundleError: a download or a sealed file that is not to be believed.
    """
    kind, path = _parse(name)
    check_seed(seed)
    check_image_size(image_size)
    if type(memory_bytes) is not int or memory_bytes < 0:
        raise SettingError("not a number of bytes", where="memory_bytes", got=repr(memory_bytes)[:80])
    if path is None:
        _refuse_keys(name, keys)
        return _public(kind, data_dir, seed, image_size, progress)
    if data_dir is not None:
        raise SettingError("the data is named by its path; no data folder is taken", where=name, got=str(data_dir))
    if kind == "sealed":
        if keys is None:
            raise SettingError("sealed data needs a key and a signer", where=name, hint="--data-key and --data-signer")
        return _sealed(name, path, seed, image_size, keys, memory_bytes)
    _refuse_keys(name, keys)
    return _photos(name, kind, path, seed, image_size)


def _public(kind: str, data_dir: Path | None, seed: int, image_size: int | None, progress: Progress | None) -> DataSet:
    known = published.SETS[kind]
    located = published.locate(kind, data_dir, progress=progress)
    folder = located.folder
    contents: dict[str, bytes] = {}
    if kind in cifar.LAYOUTS:
        train, test = cifar.read_cifar(folder / known.files[0].name, cifar.LAYOUTS[kind])
    else:
        train, test, contents = digits.read_digits(folder)
    augmentation = CropFlip(known.padding, known.flip)
    splits = [
        FixedRecords(ArrayPixels(images), labels, augmentation=augmentation, image_size=image_size)
        for images, labels in (train, test)
    ]
    return DataSet(
        name=kind,
        train=splits[0],
        test=splits[1],
        classes=known.classes,
        shape=splits[0].shape,
        mean=known.mean,
        std=known.std,
        padding=known.padding,
        flip=known.flip,
        private=False,
        seed=seed,
        provenance=published.provenance(kind, located, contents),
    )


def _photos(name: str, kind: str, path: Path, seed: int, image_size: int | None) -> DataSet:
    found = read_folder(path, seed=seed, need_splits=kind == "imagenet")
    size = image_size
    if size is None:
        size = PHOTO_SIZE if kind == "imagenet" else natural_size(found.train)
    train, test = (PhotoRecords(photos, photos.labels, size=size) for photos in (found.train, found.test))
    return DataSet(
        name=name,
        train=train,
        test=test,
        classes=found.classes,
        shape=train.shape,
        mean=published.IMAGENET_MEAN,
        std=published.IMAGENET_STD,
        padding=PHOTO_PADDING,
        flip=True,
        private=False,
        seed=seed,
        provenance=f"photos from {path} ({found.how}); the host reads them: private data is sealed first",
    )


def _sealed(
    name: str, path: Path, seed: int, image_size: int | None, keys: DataKeys | ReleasedKeys, memory_bytes: int
) -> DataSet:
    if isinstance(keys, ReleasedKeys):
        source = open_released(keys, memory_bytes=memory_bytes, image_size=image_size)
    else:
        source = open_sealed(path, keys, memory_bytes=memory_bytes, image_size=image_size)
    manifest, header = source.manifest, source.header
    return DataSet(
        name=name,
        train=source.train,
        test=source.test,
        classes=manifest.classes,
        shape=source.train.shape,
        mean=manifest.mean,
        std=manifest.std,
        padding=manifest.padding,
        flip=manifest.flip,
        private=True,
        seed=seed,
        provenance=f"sealed data {header.bundle_id.hex()}, release {header.release}, signed by {header.signer.key_id}",
        source=source,
    )


def _parse(name: str) -> tuple[str, Path | None]:
    kind, colon, place = name.partition(":")
    if not colon and kind in published.SETS:
        return kind, None
    if colon and kind in PLACED and place:
        return kind, Path(place)
    known = ", ".join((*published.SETS, *(f"{each}:PATH" for each in PLACED)))
    raise SettingError("no data set of that name", expected=known, got=repr(name)[:200])


def _refuse_keys(name: str, keys: DataKeys | ReleasedKeys | None) -> None:
    if keys is not None:
        raise SettingError("keys are for sealed data only", where=name, hint="sealed:FILE")
