"""Raw images: page n at n * page size; holes of a sparse file are pages that were never touched."""

from __future__ import annotations

import os

from ksm.errors import SourceError
from ksm.sources.data import Data, FileData
from ksm.sources.image import Segment
from ksm.sources.stored import Extent, StoredImage, check_page_size


class RawImage(StoredImage):
    """A file of pages: QEMU pmemsave, Firecracker memory files, VMware .vmem, memory-backing files.

    The file is mapped block by block, never read as a whole, and must not shrink meanwhile. A file with holes tells
    never-touched pages from zeroed ones (`anonymous_known`); one without does not.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     _ = f.write(bytes(8192)); f.flush()
    ...     RawImage(f.name).npages
    2
    """

    format = "raw"

    def __init__(self, path: str | os.PathLike[str] | Data, page_size: int = 4096) -> None:
        check_page_size(page_size)
        data = path if isinstance(path, Data) else FileData(os.fspath(path))
        try:
            size = data.size()
            if size == 0:
                raise SourceError(f"{data.name}: the file is empty")
            if size % page_size:
                raise SourceError(
                    f"{data.name}: ends at offset {size} inside a page of {page_size} bytes, "
                    f"{size % page_size} bytes after the last whole one: truncated, or not a raw image"
                )
            super().__init__([data], [Extent(0, 0, size)], page_size, segments=[Segment(0, size)])
        except BaseException:
            data.close()
            raise
