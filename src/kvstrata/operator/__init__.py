"""The operator: makes a Deployment and a Service of vLLM for each Model of a Kubernetes namespace.

``python -m kvstrata.operator --help``; wants the extra ``operator`` (kopf). docs/kubernetes.md.

    spec         what a Model says, checked
    manifests    the objects that follow from it (pure)
    api          the few requests to Kubernetes' API that are needed
    conditions   what the status says
    reconcile    makes the cluster fit a Model, and says what is
    run          kopf: watches, and calls reconcile
"""
