"""`python -m resq_deploy` is `resq-deploy`."""

from resq_deploy.cli import main

main()
