"""Export a run for Hugging Face's transformers: export_huggingface.py run=<folder> output_dir=<folder>."""

from alibi_lm.cli import command
from alibi_lm.interop.huggingface import ExportConfig, export_huggingface


@command(ExportConfig)
def main(config: ExportConfig) -> None:
    folder = export_huggingface(config)
    print(f"{folder}: exported, and loaded again with the same scores. In Python:")
    print("  import alibi_lm.interop.huggingface")
    print(f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    print(f"Evaluate it: python scripts/evaluate.py model=hf:{folder} data=text data.path=<folder of text>")


if __name__ == "__main__":
    main()
