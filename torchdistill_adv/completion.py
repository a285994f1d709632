"""Completion of the command line with the Tab key."""

from __future__ import annotations

import argparse

from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses import AdversarialTerm

SHELLS = ("bash", "zsh")
FILES = ("config", "ckpt", "out", "run_log")
FOLDERS = ("runs",)

INSTALL = """\
Print a script that completes commands, options, the losses of add, and files with the Tab key. It needs the extra
'completion': pip install 'torchdistill-adv[completion]'. Write the script again after an update.

bash:  torchdistill-adv completion bash > ~/.local/share/bash-completion/completions/torchdistill-adv
       (mkdir -p that folder first; it needs the package bash-completion, else source the file in ~/.bashrc)
zsh:   torchdistill-adv completion zsh > ~/.zfunc/_torchdistill-adv
       with fpath+=~/.zfunc before compinit in ~/.zshrc
"""


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of a shell that completes the commands of ``parser``; :data:`INSTALL` says where it goes.

    The script has all names in it, so nothing of this package is imported when Tab is pressed.

    Args:
        parser: with its commands as subparsers.
        shell: one of :data:`SHELLS`.

    Raises:
        ConfigError: shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            "needs shtab, which is not installed; pip install 'torchdistill-adv[completion]'", "completion"
        ) from error
    for group in parser._actions:
        for command in group.choices.values() if isinstance(group, argparse._SubParsersAction) else ():
            for action in command._actions:
                if action.dest in FILES + FOLDERS:
                    action.complete = shtab.FILE if action.dest in FILES else shtab.DIRECTORY
                elif action.dest == "loss":
                    action.choices = [name for name, loss in MIDDLE_LEVEL_LOSS_DICT.items() if _is_adversarial(loss)]
    script: str = shtab.complete(parser, shell)
    return script


def _is_adversarial(loss: object) -> bool:
    return isinstance(loss, type) and issubclass(loss, AdversarialTerm)
