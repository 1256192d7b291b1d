"""The command `sparsefx explain | sparsify | export | bench`: what it is told, and what it says.

argparse of the standard library: four commands with a few options each do not pay for a dependency.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sparsefx.commands import bench, explain, export, sparsify
from sparsefx.errors import MissingCalibration, SparseFXError
from sparsefx.model_files import DTYPES

GUARDS = ("measure", "model", "off")
EXPORT_GUARDS = ("measure", "off")
FORMS = ("standard", "functions")
TARGETS = ("cpu", "cuda", "a100", "h100", "h200", "l4")
OPSETS = (20, 24)

_ABOUT = """\
Finds the zeros in a model's weights, puts more there if told to, and runs the model faster for it
where that is true. MODEL is a folder that Hugging Face's save_pretrained wrote (also one that holds
a single .gguf file), or a bare .safetensors file. Nothing is downloaded."""

_EXAMPLES = """\
examples:
  sparsefx explain my-model/                     which zeros are there, what they are worth here
  sparsefx explain weights.safetensors           the patterns alone; needs no model class
  sparsefx sparsify my-model/ recipe.toml out/   prune, save a smaller checkpoint
  sparsefx export my-model/ model.onnx --recipe recipe.toml
  sparsefx bench my-model/ --recipe recipe.toml  whole model against torch.compile, in turns

a recipe names weights, and attentions, by glob; the first one that matches decides:
  [[weights]]
  match = "*.mlp.*"
  pattern = "nm"              # n kept of m
  n = 2
  m = 4
  values = "int4"             # codes: or "int8", "int8_dynamic", "fp8"; group = 128 to a scale
  [[weights]]
  match = "*.self_attn.*"
  pattern = "unstructured"    # or "block" (rows, cols, sparsity), "rows", "columns", "dense"
  sparsity = 0.5
  criterion = "sparsegpt"     # or "wanda", "dsnot", "reconstruct", "random", "magnitude" (default)
  [allocation]
  method = "owl"              # or er, erk, zerothorder, globalmagnitude, knapsack, within
  [[attention]]
  match = "*.self_attn"
  method = "skip_softmax"     # or "theta" (k, ...), or "dense"
  sparsity = 0.7              # or error, or scale_factor = [prefill, decode]

permute = true at the top lets input channels of N:M weights change places. criteria but magnitude
and random, owl, zerothorder, knapsack, within, permute, and attention without scale_factor are
calibrated on data: a .safetensors file of batches, tensors input_ids.0, input_ids.1, ..., or
one input_ids [batches, batch, length]:
  sparsefx explain my-model/ --recipe recipe.toml --calibration text.safetensors

`sparsefx COMMAND --help` explains the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after one line on stderr that says what to change."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.run
    try:
        with torch.no_grad():
            command(args)
    except (SparseFXError, OSError) as error:
        hint = "; in the shell: --calibration FILE" if isinstance(error, MissingCalibration) else ""
        print(f"sparsefx {args.command}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsefx",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_explain(commands)
    _add_sparsify(commands)
    _add_export(commands)
    _add_bench(commands)
    return parser


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "show which zeros a model holds and what they are worth on this machine"
    command = _add_command(commands, "explain", explain, text)
    _add_compile_options(command)
    _add_reports(command)


def _add_reports(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, metavar="PATH", help="also write the table as JSON")
    command.add_argument("--html", type=Path, metavar="PATH", help="also write the table as HTML")


def _add_sparsify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "set weights to zero by a recipe and save a smaller, sparse checkpoint"
    command = _add_command(commands, "sparsify", sparsify, text)
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML; see sparsefx --help")
    command.add_argument("out", type=Path, metavar="OUT", help="new folder for the checkpoint")
    _add_calibration(command)
    command.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="keeps what is found block by block: the same command goes on after it was stopped",
    )
    _add_reports(command)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "write an ONNX file with packed weights that a stock onnxruntime loads"
    command = _add_command(commands, "export", export, text)
    command.add_argument("out", type=Path, metavar="OUT", help="the .onnx file to write")
    _add_input_options(command)
    command.add_argument(
        "--form",
        choices=FORMS,
        help="standard: standard operators only (default); functions: sparsefx operators whose "
        "bodies are standard, for a runtime that knows them",
    )
    command.add_argument(
        "--ort-library",
        type=Path,
        metavar="PATH",
        help="also compile kernels for its sparse linears into a library that onnxruntime's "
        "register_custom_ops_library loads (form: functions)",
    )
    command.add_argument(
        "--guard",
        choices=EXPORT_GUARDS,
        default=EXPORT_GUARDS[0],
        help="measure (default): the library leaves alone what it does not make faster here, at "
        "these shapes; off: it takes all",
    )
    command.add_argument(
        "--opset", type=int, choices=OPSETS, default=OPSETS[0], help="default: %(default)s"
    )
    command.add_argument(
        "--dynamic", action="store_true", help="let batch size and sequence length vary"
    )


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "time the whole model under torch.compile and under SparseFX, in turns"
    command = _add_command(commands, "bench", bench, text)
    _add_compile_options(command)
    command.add_argument(
        "--runs", type=_positive, default=30, metavar="N", help="pairs of runs (default: 30)"
    )
    command.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="also write the tuning results, a .json file for --tuned and sparsefx.compile(tuned=)",
    )


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    command.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder, or .safetensors file"
    )
    command.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="number format to load the weights in (default: that of the file)",
    )
    return command


def _add_compile_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        choices=TARGETS,
        help="default: cuda where there is a GPU, else cpu; a GPU by name is planned for, present "
        "or not, and needs --guard model",
    )
    command.add_argument(
        "--guard",
        choices=GUARDS,
        default=GUARDS[0],
        help="how a kernel must win against dense: timed here (measure, default), by the roofline "
        "(model), or not at all (off)",
    )
    command.add_argument(
        "--tuned",
        type=Path,
        metavar="FILE",
        help="tuning results that bench --save wrote, so that nothing need be timed here",
    )
    _add_input_options(command)


def _add_input_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recipe", type=Path, metavar="TOML", help="apply this recipe first (in memory only)"
    )
    _add_calibration(command)
    command.add_argument(
        "--rows",
        type=_positive,
        default=128,
        metavar="N",
        help="tokens (rows of a bare file's inputs) of the made-up sample (default: 128)",
    )
    command.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help=".safetensors with the arguments of one call by name, in place of the made-up sample",
    )


def _add_calibration(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help=".safetensors with batches to calibrate the recipe on; see sparsefx --help",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("at least 2")
    return number


if __name__ == "__main__":
    sys.exit(main())
