"""Text to token files as datatrove's DocumentTokenizer does it, with its local executor: a task for each input file.

python datatrove.py json|parquet FILES TOKENIZER OUT NUM_PROC
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this folder: a script of this name would be imported instead of the library

from datatrove.executor import LocalPipelineExecutor  # noqa: E402
from datatrove.pipeline.readers import JsonlReader, ParquetReader  # noqa: E402
from datatrove.pipeline.tokens import DocumentTokenizer  # noqa: E402


def main() -> None:
    kind, files, tokenizer, out, num_proc = sys.argv[1:]
    reader = JsonlReader if kind == "json" else ParquetReader
    pattern = Path(files)
    LocalPipelineExecutor(
        pipeline=[
            reader(str(pattern.parent), glob_pattern=pattern.name),
            DocumentTokenizer(
                output_folder=f"{out}/tokens",
                tokenizer_name_or_path=f"{tokenizer}/tokenizer.json",
                eos_token="[EOT]",
                shuffle_documents=False,
            ),
        ],
        tasks=int(num_proc),
        workers=int(num_proc),
        logging_dir=f"{out}/logs",
    ).run()


if __name__ == "__main__":
    main()
