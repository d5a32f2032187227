# Compiler flags for LIBTPU_INIT_ARGS, one reason each. Sourced by run.sh.
flags=(
  --xla_tpu_scoped_vmem_limit_kib=98304 # larger fusions: the default VMEM budget splits big matmul epilogues
)
export LIBTPU_INIT_ARGS="${flags[*]}"
