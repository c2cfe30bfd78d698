"""Lines of text written by Ray as they are. Imported only where Ray is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

if TYPE_CHECKING:
    import pyarrow as pa


class LinesSink(BlockBasedFileDatasink):
    """Writes the first column of each block, a line per row."""

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        """Write one part file."""
        table = block.to_arrow()
        for line in table.column(0).to_pylist():
            file.write(line.encode() + b"\n")
