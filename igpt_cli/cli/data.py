import typer
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
@app.command("noop")
def noop(): ...
