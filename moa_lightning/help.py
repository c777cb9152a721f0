"""The texts of `moa --help` and `moa COMMAND --help`: the options that most runs need, by group.

All the others are listed by the parser itself: `moa fit --help all`.
"""

USAGE = """usage: moa COMMAND ...

  fit        train:  moa fit -c configs/vision/mae_tiny.yaml -c configs/data/mnist5k.yaml -c configs/ffn/moa.yaml
  validate   measure on held-out data:  moa validate --ckpt_path runs/mae/version_0/checkpoints/last.ckpt
  test       on the test split, once the settings are chosen
  predict    features of images (of any folder: --folder DIR --out features.parquet), losses of texts
  generate   text from a language model: moa generate --ckpt_path RUN/checkpoints/last.ckpt --prompt 'def '
  ablate     a grid of runs with a table and plots: moa ablate configs/grids/quickstart.yaml
  bench      what the layers cost on this machine: moa bench op step --out results
  plan       what a run needs, before it has it: moa plan -c configs/language/gpt_124m.yaml --device h100
  theory     what separates fixed activations, LA and MoA, computed: moa theory
  data       write WebDataset shards, train a tokenizer, write token files:  moa data tokens --source stdlib --out DIR
  export     the weights as one file:  moa export --ckpt_path RUN/checkpoints/last.ckpt --out mae.safetensors
             --to timm: the encoder for timm; --to hf: a language model for transformers

moa COMMAND --help lists the options of a command.
"""

_CONFIGS = """config files
  -c FILE                         a YAML file; any number of them in any order, later ones win, and options win over
                                  files. configs/... is found in the working folder, then inside the package
  --print_config                  print the merged configuration and stop
  --import MODULE                 import a Python module first, for instance one that registers an activation;
                                  may be repeated
"""

_DEVICES = """devices (--trainer.*)
  --trainer.accelerator NAME      auto, cpu, gpu, ...
  --trainer.devices N             number of devices, or auto
  --trainer.strategy NAME         auto, ddp (a copy of the net on each device), fsdp2 (the net sharded over them)
  --trainer.precision NAME        32-true, bf16-mixed, or auto: bf16-mixed where the device is fast at it (the default)
"""

_FIT = f"""usage: moa fit [-c FILE ...] [--option value ...]

Train:  moa fit -c configs/language/gpt_tiny.yaml -c configs/data/stdlib.yaml -c configs/ffn/moa.yaml

{_CONFIGS}
what is trained (--model.*)
  --model TASK                    LanguageModeling, SequenceClassification, MAE, DINO or ImageClassification; moa fit
                                  --model.help MAE lists its options
  --model.ffn.activation NAME     identity, gelu, silu, relu, leaky_relu, relu2, tanh, ...
  --model.ffn.mixing KIND         fixed, la (a learned mix), moa (a mix gated per token)
  --model.ffn.gate NAME           sigmoid, softmax, tanh
  --model.backbone NAME           timm vision transformer (MAE, DINO, ImageClassification)
  --model.backbone_weights FILE   what ImageClassification starts from: a checkpoint of MAE or DINO, or timm's weights
  --model.optimizer.lr RATE       peak learning rate
  --model.compile true            compile the blocks (pays off in runs of more than a few minutes)

on what (--data.*)
  --data MODULE                   TextFiles, TextShards, TokenFiles, Mixture, TextTask, LabelledFiles, Images or
                                  ImageShards; moa fit --data.help Images lists the options of one
  --data.source PATH              where from (TextFiles, TokenFiles, Images)
  --data.batch_size N             samples in a batch, over all devices together

how long (--trainer.*)
  --trainer.max_steps N           optimiser steps
  --trainer.max_epochs N          passes over the data
  --trainer.max_time DD:HH:MM:SS  and the like
  --trainer.val_check_interval N  optimiser steps between validations (a fraction: of an epoch); the last step is always
                                  validated. Default: a tenth of max_steps
  --trainer.accumulate_grad_batches N   batches in an optimiser step
  --trainer.gradient_clip_val X   largest norm of the gradient
  --choices FILE                  multiple-choice questions (HellaSwag, ARC; JSONL) to answer at every validation

{_DEVICES}
the run
  --run_dir DIR                   its folder: config, events, metrics, checkpoints (default: runs/<task>/version_<next>)
  --ckpt_path last                continue the run in --run_dir; auto: or begin it; or the path of a checkpoint
  --checkpoint.keep_last N        how many of the latest checkpoints are kept (1)
  --seed_everything N             initial weights (default 0); the data's order has --data.seed

moa fit --help all                every option of the trainer, checkpoints, guard, watchdog, pruning
"""

THEORY = """usage: moa theory [--out DIR] [--quick] [--seed N]

The separations fixed < LA < MoA, executed: one-unit layers that compute the separating functions exactly, the best fits
of fixed activations and of LA at growing width, and how many units buy the same error. Two minutes on one core.

  --out DIR                       folder for theory.json and theory.png (default: runs/theory)
  --quick                         fewer widths, activations and starts: seconds
  --seed N                        of the random starts (default 0)
"""


PLAN = f"""usage: moa plan --device KIND [--devices N] [-c FILE ...] [--option value ...]

Memory, FLOPs, network, time and cost of a fit, without its devices and its data:
  moa plan -c configs/language/gpt_124m.yaml -c configs/ffn/moa.yaml --device h100 --devices 8
Without --devices: how many are needed. The options are those of moa fit, and:

  --device KIND                   a100-40, a100-80, h100, h200, b200, l40s, rtx4090; or any other name, with
                                  --memory and --tflops
  --devices N                     of them, on all machines together
  --mfu SHARE                     of the peak FLOP/s that the run will reach (default 0.4, an assumption)
  --price X                       of one device for an hour; without it no cost is given
  --train_samples N               samples of an epoch, for a run whose length is in epochs
  --memory GB, --tflops N         of a device, at the run's precision; they replace those of a known kind
  --bandwidth GB                  that a device sends in a second
  --json                          for machines: bytes, seconds, FLOPs

{_CONFIGS}
sizes that come from data, where no data module says them
  --model.vocab_size N            --data.context_length N   --data.image_size N   --data.channels N

Compilation is left out: it lowers the memory of activations, and by how much depends on the compiler.
"""


BENCH = """usage: moa bench [op] [layer] [step] [decode] [data] [--option value ...]

What swapping the activation costs on this machine, as Markdown tables:  moa bench op step --out results
Without names: all of these, in less than ten minutes on two CPU cores.

  op                              the mix by each kernel, forward and backward, against one GELU; gated mixes against
                                  torch's SwiGLU (and liger_kernel's on a GPU, where that is installed)
  layer                           the feed-forward layer, eager and compiled
  step                            a training step of a GPT and of a ViT-MAE: time, MFU, peak memory. On a GPU the GPT
                                  has 124 M parameters and a context of 1,024 tokens
  decode                          one token at batch 1
  data                            image and text shards against the bare limit

  --out DIR                       write <device>-<names>.json and .md there
  --device NAME                   cpu or cuda (default: a GPU where there is one)
  --quick                         tiny sizes, few rounds: to see that it works, not to judge by
"""


def _evaluation(command: str, what: str, result: str) -> str:
    return f"""usage: moa {command} --ckpt_path CHECKPOINT [--option value ...]

{what} moa {command} --ckpt_path runs/mae/version_0/checkpoints/last.ckpt
The settings are those of the checkpoint's run; -c and options change them. {result}

  --ckpt_path PATH                the checkpoint; `last` together with --run_dir
  --run_dir DIR                   the run's folder (default: the one that the checkpoint lies in)
  --data.batch_size N             samples in a batch, over all devices together

{_CONFIGS}
{_DEVICES}
moa {command} --help all          every option
"""


COMMAND_HELP = {
    "fit": _FIT,
    "validate": _evaluation(
        "validate",
        "Measure on the validation split.",
        "Prints a table of metrics. With\n--freeze_gates N it measures once more, every mix held at its mean over N "
        "training batches; with\n--choices FILE a language model answers multiple-choice questions (JSONL).",
    ),
    "test": _evaluation(
        "test",
        "Measure on the test split.",
        "Prints a table of metrics, with --choices\nFILE also of answers to multiple-choice questions.",
    ),
    "predict": _evaluation(
        "predict",
        "Features of test images (MAE, DINO), losses of test texts (LanguageModeling), answers (the classifiers).",
        "Writes predictions.npz. For all\nimages of a folder, with their file names:\n"
        "moa predict --ckpt_path RUN/checkpoints/last.ckpt --folder pictures --out features.parquet\n"
        "--out ends in .npz or in .parquet, which needs pyarrow.",
    ),
}
