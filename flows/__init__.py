"""What runs, in which order: Prefect flows, the command line and the deployments."""
