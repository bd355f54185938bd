"""The command `hivegrpo`: parse, then import what the command needs. Nothing here imports torch."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Literal

import typer

from hivegrpo.cli.operate_commands import coordinator_app
from hivegrpo.protocol.errors import HiveError
from hivegrpo.protocol.text import visible

app = typer.Typer(
    help="Volunteers' machines train one language model together, by reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
run_key_app = typer.Typer(help="The key, kept offline, that can give a run another coordinator.")
peer_app = typer.Typer(help="Take part in a run with this machine.")
app.add_typer(coordinator_app, name="coordinator", no_args_is_help=True)
app.add_typer(peer_app, name="peer", no_args_is_help=True)
app.add_typer(run_key_app, name="run-key", no_args_is_help=True)

Home = Annotated[Path | None, typer.Option(help="Folder of its own; runs/<run id>/<role> in the state folder if not.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on; all of this machine's if left out.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; a free one, which is kept, if left out.")]
Dht = Annotated[bool | None, typer.Option("--dht/--no-dht", help="Find others through the DHT too (default: yes).")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on stdout; stops when their reader goes away.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log details to stderr.")]
Run = Annotated[str | None, typer.Argument(help="A run's folder or address; the latest run here if left out.")]
Dtype = Literal["float32", "bfloat16"]
Revision = Annotated[str, typer.Option(help='"latest", "base", or a version number.')]


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Options of the command itself."""
    if show_version:
        typer.echo(installed_version("hivegrpo"))
        raise typer.Exit


@coordinator_app.command("run")
def run_coordinator(
    config: Annotated[Path, typer.Option("--config", "-c", help="run.toml: what the run is.")],
    home: Home = None,
    host: Host = None,
    port: Port = None,
    dht: Dht = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new run, even if one of this config can go on.")] = False,
    exit_when_finished: Annotated[
        bool | None,
        typer.Option("--exit-when-finished/--keep-serving", help="After the last version (default: keep serving)."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Launch a run, or go on with the unfinished one of the same config. Prints the line that peers paste."""
    from hivegrpo.cli.launch_coordinator import launch

    flags = {"home": home, "host": host, "port": port, "dht": dht, "exit_when_finished": exit_when_finished}
    launch(config, flags, new=new, as_json=as_json, verbose=verbose)


@coordinator_app.command("succeed")
def succeed_coordinator(
    home: Annotated[Path, typer.Argument(help="The coordinator's home; it must not run.")],
    succession: Annotated[str | None, typer.Option(help="What `hivegrpo run-key sign` printed.")] = None,
) -> None:
    """Give a run another coordinator key: print what the run key has to sign; then, with --succession, take it over."""
    from hivegrpo.cli.succeed import succeed

    succeed(home, succession)


@run_key_app.command("create")
def create_run_key(file: Annotated[Path, typer.Argument(help="Where to write the key.")]) -> None:
    """Make a run key, and print the line for [run] in run.toml."""
    from hivegrpo.cli.run_key import create

    create(file)


@run_key_app.command("sign")
def sign_succession(
    file: Annotated[Path, typer.Argument(help="The run key.")],
    run_id: Annotated[str, typer.Option("--run", help="The run's id.")],
    number: Annotated[int, typer.Option(min=1, help="Of the succession, from 1.")],
    coordinator: Annotated[str, typer.Option(help="The new coordinator's peer id.")],
    first: Annotated[int, typer.Option(min=0, help="The first version that it signs.")],
    parent: Annotated[str, typer.Option(help="Digest of the version before that.")],
) -> None:
    """Name a run's next coordinator: `hivegrpo coordinator succeed HOME` prints this command, filled in."""
    from hivegrpo.cli.run_key import sign_succession as write

    write(file, run_id=run_id, number=number, coordinator=coordinator, first=first, parent=parent)


@peer_app.command("run")
def run_peer(
    address: Annotated[str, typer.Argument(help="The run's address, as its coordinator printed it.")],
    home: Home = None,
    host: Host = None,
    port: Port = None,
    dht: Dht = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; cores / peers here if left out.")] = None,
    invite: Annotated[str | None, typer.Option(help="Token to join with, for the first time.")] = None,
    upload_mbit: Annotated[float | None, typer.Option(help="Most to send, in Mbit/s; no cap if left out.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="The run's id: nothing but this run will do.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Join a run and work until it is finished. The first Ctrl-C leaves gracefully, the second at once."""
    from hivegrpo.cli.launch_peer import launch

    flags: dict[str, object] = {"home": home, "host": host, "port": port, "dht": dht}
    flags |= {"device": device, "threads": threads, "upload_mbit": upload_mbit, "invite": invite}
    launch(address, flags, run_id=run_id, as_json=as_json, verbose=verbose)


@app.command()
def solo(
    config: Annotated[Path, typer.Option("--config", "-c", help="run.toml: what the run is.")],
    to: Annotated[Path | None, typer.Option(help="Write the trained model to this folder at the end.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of its own; one in the state folder if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; cores / peers here if left out.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a run on this machine alone: try settings before others spend their time on them. Goes on after Ctrl-C."""
    from hivegrpo.cli.launch_solo import launch

    flags = {"device": device, "threads": threads}
    launch(config, flags, home=home, to=to, as_json=as_json, verbose=verbose)


@app.command()
def sweep(
    file: Annotated[Path | None, typer.Argument(help="A sweep.toml; what flags say comes first.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="run.toml to vary; the demo's if none.")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="SECTION.KEY=VALUE,VALUE; once for each key.")] = None,
    versions: Annotated[int | None, typer.Option(min=1, help="Length of each run; the config's if left out.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Instead: seconds of training of each run.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Instead: tokens that each run samples.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each point, from the config's seed on.")] = None,
    peers: Annotated[int | None, typer.Option(min=0, max=16, help="Train each over so many peers here.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Runs side by side, which share the cores.")] = 1,
    to: Annotated[Path | None, typer.Option(help="Folder of the sweep; one in the state folder if left out.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again the runs that have failed.")] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of settings with the same small budget, and compare them. Goes on after Ctrl-C, or a crash."""
    from hivegrpo.cli.sweep.launch import launch

    flags = {"versions": versions, "seconds": seconds, "tokens": tokens, "seeds": seeds, "peers": peers}
    launch(file, config, grid or [], flags, parallel=parallel, to=to, retry_failed=retry_failed, as_json=as_json)


@app.command()
def demo(
    peers: Annotated[int, typer.Option(min=1, max=16, help="Peers to start beside the coordinator.")] = 3,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Another run.toml than the one shipped.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write what happened to this file, as JSON.")] = None,
) -> None:
    """A coordinator and some peers on this machine teach a small model to add."""
    from hivegrpo.cli.demo import run_demo

    run_demo(peers=peers, config=config, report=report)


@app.command()
def chat(
    run: Annotated[
        str | None, typer.Argument(help="A run's folder or address, or an exported folder; the latest run if left out.")
    ] = None,
    revision: Revision = "latest",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help='Answer this and exit; "-" is all that comes on stdin.')
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base model answer too, for comparison.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; as in training if left out.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Sample, with the training's top_p and top_k; 0 does not.")
    ] = 0.0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    quantize: Annotated[
        Literal["4bit", "8bit"] | None, typer.Option(help="Hold the model in less memory, by bitsandbytes.")
    ] = None,
) -> None:
    """Talk to a trained model; lines on stdin are prompts, /help lists commands.

    Ctrl-C stops an answer; at the prompt it shows help, and twice in a row it ends with exit code 130. The end of input
    (Ctrl-D) ends with 0.
    """
    from hivegrpo.cli.output import configure_logging
    from hivegrpo.peer.inference.chat import chat as start_chat

    configure_logging(verbose=False)
    code = start_chat(
        run,
        revision,
        prompt,
        compare=compare,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        device=device,
        quantize=quantize,
    )
    raise typer.Exit(code)


@app.command()
def export(
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    run: Run = None,
    revision: Revision = "latest",
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapter, not merged into the base.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of merged weights; the base's if left out.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card; the base's if left out, and known.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="For the card: what `hivegrpo evaluate` wrote.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to the hub, as this model; private if it is new.")] = None,
) -> None:
    """Write the trained model as a Hugging Face folder, with a card that says where it comes from."""
    from hivegrpo.cli.launch_export import launch

    launch(run, to, revision, adapter=adapter, dtype=dtype, license=license, evaluation=evaluation, push=push)


@app.command()
def cost(
    run: Run = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of one device's hour, in any currency.")
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0.0, help="That one working device takes.")] = None,
    price_per_kwh: Annotated[float | None, typer.Option(min=0.0, help="Of energy, in the same currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a run has cost so far, in device-hours, tokens and bytes, and at your prices: from its signed chain."""
    from hivegrpo.cli.cost import show_cost
    from hivegrpo.peer.inference.cost import Prices

    show_cost(run, Prices(price_per_hour, watts, price_per_kwh), as_json=as_json)


@app.command()
def evaluate(
    run: Annotated[
        str | None, typer.Argument(help="A run's folder or address, or an exported folder; the latest run if not.")
    ] = None,
    revision: Annotated[
        list[str] | None, typer.Option(help="As for chat; several make one table. base and latest if left out.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="evaluate.toml: several benchmarks.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="File, hub dataset, reasoning_gym:TASK or addition:DIGITS; the run's held-out rows if not."),
    ] = None,
    reward: Annotated[str | None, typer.Option(help="Function that scores; the run's first if left out.")] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help="Completions to sample of each problem; only greedy if left out."),
    ] = None,
    k: Annotated[list[int] | None, typer.Option("-k", help="For pass@k and maj@k; 1 and n if left out.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the samples; the training's if left out.")] = None,
    limit: Annotated[int | None, typer.Option(help="Problems, from the top; all if left out.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of samples and results; in the state folder if not.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure how well models solve problems, with intervals; goes on after Ctrl-C where it stopped."""
    from hivegrpo.cli.launch_evaluate import launch

    flags = {"source": data, "reward": reward, "n": samples, "k": k, "temperature": temperature, "limit": limit}
    launch(run, revision, flags, config=config, to=to, device=device, as_json=as_json)


@app.command()
def serve(
    run: Annotated[
        str | None, typer.Argument(help="A run's folder or address, or an exported folder; the latest run if left out.")
    ] = None,
    revision: Revision = "latest",
    follow: Annotated[float | None, typer.Option(help="Look for a newer version every so many seconds.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if left out.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 if left out, 0 takes a free one.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="What clients have to send; better in HIVEGRPO_SERVE_API_KEY.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="What clients call the model; the run's name if not.")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers (default), or vllm where it is installed.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    queue: Annotated[int | None, typer.Option(help="Requests in work or waiting; 128 if left out.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer programs that speak OpenAI's API. The first Ctrl-C lets requests finish, the second does not."""
    from hivegrpo.cli.launch_serve import launch

    flags: dict[str, object] = {"follow": follow, "host": host, "port": port, "api_key": api_key, "engine": engine}
    flags |= {"device": device, "queue": queue, "names": name or None}
    launch(run, flags, revision=revision, as_json=as_json, verbose=verbose)


@app.command()
def check(
    run: Annotated[Path | None, typer.Argument(help="A run's folder; the latest run here if left out.")] = None,
) -> None:
    """Verify a run's invariants from what its coordinator and peers on this machine wrote down."""
    from hivegrpo.cli.check_run import check_run

    check_run(run)


@app.command()
def watch(
    address: Annotated[str, typer.Argument(help="The run's address, or with --run that of any peer in it.")],
    run_id: Annotated[str | None, typer.Option("--run", help="The run's id: nothing but this run will do.")] = None,
    first: Annotated[int | None, typer.Option("--from", min=0, help="Version to begin at; the newest if not.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Only what is there now.")] = False,
    home: Annotated[Path | None, typer.Option(help="Folder of its own; one in the state folder if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Follow a run's signed chain and verify it, without taking part: exit code 76 if it is forged, or forked."""
    from hivegrpo.cli.launch_watch import launch

    launch(address, run_id=run_id, home=home, first=first, once=once, as_json=as_json)


@app.command()
def simulate(
    peers: Annotated[int, typer.Option(min=1, max=100_000, help="Peers at the beginning.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="Versions to commit.")] = 20,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same history; a fresh one if left out.")
    ] = None,
    faults: Annotated[
        str,
        typer.Option(
            help='"none", "all", or rates, as churn=0.2,loss=0.05; also crashes, coordinator, partitions, slow, liars.'
        ),
    ] = "none",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A run.toml whose sections grpo, averaging and timing count.")
    ] = None,
    values: Annotated[int, typer.Option(min=1, help="Length of the vector that is averaged.")] = 400_000,
    speed: Annotated[float, typer.Option(min=0.001, help="Groups a second of the median peer.")] = 0.5,
    upload_mbit: Annotated[float, typer.Option(min=0.1, help="Mbit/s that the median peer uploads.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Try a swarm before there is one: the real coordinator with simulated peers, faults and time, in one process."""
    from hivegrpo.cli.simulate import run_simulation

    numbers = {"peers": peers, "rounds": rounds, "values": values, "speed": speed, "upload_mbit": upload_mbit}
    run_simulation(numbers, seed=seed, faults=faults, config=config, as_json=as_json)


@app.command("verify-span")
def verify_span(
    file: Annotated[Path, typer.Argument(help="A proof of fault, as peers and coordinators keep them.")],
    run: Annotated[str | None, typer.Option(help="The run's id: the proof has to be of that run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check, from nothing but its bytes, who is at fault by a proof: exit code 76 if nobody is."""
    from hivegrpo.cli.verify_span import verify

    verify(file, run, as_json=as_json)


def main() -> None:
    """Entry point: the user's mistakes end in one paragraph and an exit code, anything unexpected in a traceback."""
    try:
        app()
    except HiveError as error:
        typer.echo(f"Error: {visible(str(error))}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
