"""Text to token files as datatrove's DocumentTokenizer does it, with its local executor: a task for each input file.

python datatrove_tokens.py json|parquet FILES TOKENIZER OUT NUM_PROC
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer


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
