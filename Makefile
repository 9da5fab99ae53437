# `make demo` and `make test` need Debian, root, apt and Go; they install what is missing. See docs/testing.md.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The race detector is linked by gcc; the program itself never is.
export CGO_ENABLED = 0

.PHONY: build install man packages demo check check-engine check-others test vet alerts unit lintian count race arm64 vm soak bench bench-count bench-vm bench-hits bench-report

build:
	go build -o bin/ublk-pcache ./cmd/ublk-pcache

# What --help says, and some prose, as man pages.
man:
	rm -rf bin/man
	go run -tags man ./cmd/ublk-pcache man bin/man

# The unit and the rule call the program by this path.
install: build man
	install -D -m 755 -t $(DESTDIR)/usr/sbin bin/ublk-pcache
	install -D -m 644 -t $(DESTDIR)/usr/lib/systemd/system systemd/ublk-pcache@.service systemd/ublk-pcache-exporter.service
	install -D -m 644 -t $(DESTDIR)/usr/lib/udev/rules.d systemd/61-ublk-pcache.rules
	install -D -m 644 -t $(DESTDIR)/usr/share/man/man8 bin/man/*.8
	install -D -m 644 -t $(DESTDIR)/usr/share/man/man5 bin/man/*.5
	install -d $(addprefix $(DESTDIR)/usr/share/,bash-completion/completions zsh/vendor-completions fish/vendor_completions.d)
	bin/ublk-pcache completion bash > $(DESTDIR)/usr/share/bash-completion/completions/ublk-pcache
	bin/ublk-pcache completion zsh > $(DESTDIR)/usr/share/zsh/vendor-completions/_ublk-pcache
	bin/ublk-pcache completion fish > $(DESTDIR)/usr/share/fish/vendor_completions.d/ublk-pcache.fish

# For dpkg and rpm. The licenses of what is linked into the program go with it, as most of them ask.
VERSION = $(shell sed -n 's/^const version = "\(.*\)"$$/\1/p' cmd/ublk-pcache/version.go)
root = bin/packages/root
doc = $(root)/usr/share/doc/ublk-pcache
packages:
	rm -rf bin/packages
	GOFLAGS="$$(go env GOFLAGS) -ldflags=-s" $(MAKE) --no-print-directory install DESTDIR=$(root)
	gzip -9 -n $(root)/usr/share/man/man*/*
	install -D -m 644 -t $(doc)/examples packages/example.conf contrib/prometheus/ublk-pcache.rules.yml contrib/grafana/ublk-pcache.json
	gzip -9 -n < CHANGELOG.md > $(doc)/changelog.gz
	{ cat packages/copyright; { if test -e "$$(go env GOROOT)/LICENSE"; then echo "go $$(go env GOROOT)"; fi; \
	    go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}' ./cmd/ublk-pcache | sort -u; } | \
	  while read -r module dir; do printf '\n== %s ==\n\n' "$$module"; cat "$$dir"/LICENSE*; done; } > $(doc)/copyright
	chmod -R u=rwX,go=rX $(root)
	for format in deb rpm; do VERSION=$(VERSION) ARCH=$$(go env GOARCH) \
	  go tool -modfile=tools/go.mod nfpm package -f packages/nfpm.yaml -p $$format -t bin/packages; done

demo: build
	@install -m 755 tests/demo.sh bin/demo.sh
ifdef NATIVE
	@PATH=$(CURDIR)/bin:$$PATH bin/demo.sh
else
	@echo "Booting a virtual machine; the first time, its parts are downloaded (350 MB) ..."
	@go run ./tests/vmrun -share bin -iops 200 -timeout 10m -- demo.sh /dev/dax0.0 /dev/nvme0n1
endif

# Each phase says how long it took.
test:
	@for phase in vet alerts unit count race arm64 lintian vm; do \
	  printf '\n== %s\n' $$phase; begin=$$SECONDS; \
	  $(MAKE) --no-print-directory $$phase; \
	  printf '== %s: %d s\n' $$phase $$((SECONDS - begin)); \
	done

# With the tags vm, which adds what runs in a test machine or starts one, man and promtool.
vet:
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "not gofmt-ed: $$unformatted"; exit 1; fi
	go vet -tags vm,man,promtool ./... && go vet -C tools ./...
	go tool -modfile=tools/go.mod staticcheck -tags vm,man,promtool ./... && go -C tools tool staticcheck ./...
	go run ./tests/walls

unit:
	go test -count=1 ./...

# The engine's random tests with small budgets.
brief = -storm.ops=40 -storm.rounds=1 -hostile.execs=1000 -crash.states=1000 -model.cases=5 -meta.cases=5 -linear.rounds=2

# For every commit. The engine's tests are long, as are those of the other packages together: they run side by side.
check: vet
	@$(MAKE) --no-print-directory -j2 -O check-engine check-others

check-engine:
	go test -count=1 ./engine $(brief)

check-others:
	go test -count=1 $$(go list ./... | grep -vx ublk-pcache/engine)

# need installs packages for a program that is missing.
need = command -v $(1) >/dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends $(2); }

# What Debian's and Fedora's own tools say of the packages.
lintian: packages
	@$(call need,lintian,lintian); $(call need,rpm,rpm)
	lintian --fail-on error,warning --allow-root --tag-display-limit 0 bin/packages/*.deb
	rpm -K --nosignature bin/packages/*.rpm

# promtool is in Debian's package of Prometheus, which would start that: so it is taken out of there, and nothing installed.
alerts: export PATH := $(PATH):$(CURDIR)/bin
alerts:
	@command -v promtool >/dev/null || { mkdir -p bin && cd bin && apt-get update -q && apt-get download -q prometheus && \
	  dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 ./usr/bin/promtool && rm prometheus_*.deb; }
	promtool check rules --lint-fatal contrib/prometheus/ublk-pcache.rules.yml
	promtool test rules contrib/prometheus/ublk-pcache.rules.test.yml
	go test -count=1 -tags promtool -run '^TestBoardHasData$$' ./cmd/ublk-pcache

# An instruction is one of qemu-user's processor, whatever the machine's is.
count:
	@$(call need,gcc,gcc libc6-dev); $(call need,qemu-x86_64,qemu-user)
	go run ./tests/count -check engine/testdata/instructions

# One client, who goes through each place of something: the same few accesses over and over, most of them slow
# under the race detector.
lonely = ^TestPowerCut|^Test(GatherCrash|ChangedDiskCrashes|FingerprintCrashes|EndMarks|LogCrossesSegments|FullLogOpens|BadMemoryAtRest|HiddenKeys)$$

race:
	@$(call need,gcc,gcc libc6-dev)
	CGO_ENABLED=1 go test -count=1 -race -skip '^TestRepair' $$(go list ./... | grep -vx ublk-pcache/engine)
	CGO_ENABLED=1 go test -count=1 -race -timeout 40m ./engine -skip 'TestBadMemoryUnderLoad/durable=false|^TestIndexBytes$$|$(lonely)' $(brief)

arm64:
	GOARCH=arm64 go build ./...
	GOARCH=arm64 go vet ./...

vm:
	go test -count=1 -tags vm -timeout 70m -v ./tests

storm = go test -count=1 -tags vm -timeout 0 -v ./tests -kernel trixie-backports -limit 4h

# The random tests again, for long.
soak:
	go test -count=1 -timeout 4h -v ./ondisk -run 'TestRepairRandom$$' -repair.cases=20000
	go test -count=1 -timeout 2h -v ./engine -run 'TestCrashStates$$' -crash.states=1000000
	go test -count=1 -timeout 4h -v ./engine -run 'TestHostileImages$$' -hostile.execs=10000000
	go test -count=1 -timeout 0 -v ./engine -run '^TestModel$$' -model.cases=3000
	go test -count=1 -timeout 0 -v ./engine -run '^TestMetamorphic$$' -meta.cases=3000
	go test -count=1 -timeout 0 -v ./engine -run '^TestLinearizable$$' -linear.rounds=500
	go test -count=1 -timeout 0 -v ./engine -run '^TestModeStorm$$' -storm.rounds=300
	go test -count=1 -tags vm -timeout 0 -v ./tests -run 'TestPowerCutOfFiles$$' -cut.rounds=50
	go test -count=1 -timeout 0 ./cmd/ublk-pcache -run '^$$' -fuzz FuzzControl -fuzztime 5m
	$(storm) -guest '^TestUpgrade$$' -guest.flag=-upgrades=20
	$(storm) -guest '^TestServerKilled$$' -guest.flag=-storm.kills=150
	$(storm) -guest '^TestKilledComingAndGoing$$' -guest.flag=-storm.kills=200
	$(storm) -guest '^(TestAddAndDelLeaveNothing|TestServerStaysTheSame)$$' -guest.flag=-leak.cycles=200
	$(storm) -guest '^TestBadDisk$$' -guest.flag=-disk.hang=60s

# The commit whose engine was the first to be measured, before anything was done for its speed.
first = 2a12216629975903477c08f57b053dae2358f587

# Each round runs all of them once, so that what slows the machine down for a while slows down everything alike.
bench:
	@mkdir -p bin
	{ echo "date: $$(date -u +%F)"; echo "kernel: $$(uname -sr)"; echo "go: $$(go env GOVERSION)"; \
	  for round in 1 2 3 4 5; do go test -run '^$$' -bench . -skip '^BenchmarkCount$$' -benchtime 0.2s -timeout 30m ./engine; done; } | tee bin/bench.txt
	rm -rf bin/first && mkdir bin/first && git archive $(first) | tar -x -C bin/first
	for op in Write Read; do for at in bin/first .; do \
	  go test -C $$at -run '^$$' -bench "^Benchmark$$op$$/crc=false/size=4096/batch=16/threads=2$$" -benchtime 3s \
	    -o $(CURDIR)/bin/engine.test -cpuprofile $(CURDIR)/bin/engine.prof ./engine; \
	  go tool pprof -top -nodecount 12 -focus engine.threads -relative_percentages bin/engine.test bin/engine.prof; \
	done > bin/bench-profile-$$op.txt; done
	rm -rf bin/first

# Where the instructions are: those of the engine by function, and those of a request to each target in the test machine,
# of its server, of the kernel and of fio.
bench-count:
	@$(call need,gcc,gcc libc6-dev); $(call need,qemu-x86_64,qemu-user)
	@mkdir -p bin
	{ go run ./tests/count; go run ./tests/vmbench -count -by-function; } | tee bin/bench-count.txt

# More than half an hour on a quiet machine.
bench-vm:
	@mkdir -p bin
	go run ./tests/vmbench | tee bin/bench-vm.txt

# What is missed of traces; none comes with the source.
bench-hits:
	@mkdir -p bin
	{ echo "date: $$(date -u +%F)"; \
	  go run ./tests/replay $(or $(TRACES),$(error bench-hits plays traces, give some: make bench-hits TRACES="oltp.gz msr.csv")); } | tee bin/bench-hits.txt

bench-report:
	go run -C tools ./bench $(CURDIR)/bin $(CURDIR)/docs
