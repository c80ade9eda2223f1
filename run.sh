export OMP_NUM_THREADS=1 PYTHONPATH=/tmp/dev6
for s in 1 2 3; do for m in idml-mixup ism; do
/work/main/.venv/bin/python benchmarks/uncertainty.py --parts digits --methods "$m + foresight" --seeds $s --more-seeds --runs /tmp/trials/dev --processes 1 --out /tmp/trials/dev-$m-$s.json | grep "foreseen\|altered\|P(wrong)\|error"
done; done
