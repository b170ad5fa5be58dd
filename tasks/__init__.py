"""One verb each, as Prefect tasks: provision, train, verify, evaluate, publish, report, tend."""
