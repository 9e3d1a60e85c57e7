# SPDX-License-Identifier: GPL-2.0-only
# For Kbuild: the Rust half with the kernel's own core library, kernel crate and flags.
# Each crate is an rlib, and its object is linked into the one .ko.
vfio_iommu_dirty-y += main.o dirty_core.o intrusive_collections.o static_assertions.o

# Generic functions of the core are compiled in main, and what they call is in another
# crate. Without this flag those calls would not be inlined.
crate_fast := -Coverflow-checks=off -Copt-level=3 -Zcross-crate-inline-threshold=always

# $(1) crate, $(2) edition, $(3) source, $(4) crates that it needs
define crate
$$(obj)/$(1).o: $(3) $$(addprefix $$(obj)/,$$(addsuffix .o,$(4))) FORCE
	$$(call if_changed_dep,rustc_crate)
$$(obj)/$(1).o: private crate_name := $(1)
$$(obj)/$(1).o: private crate_src := $(3)
$$(obj)/$(1).o: private crate_flags := --edition=$(2) $$(foreach d,$(4),--extern $$(d))
endef
quiet_cmd_rustc_crate = RUSTC $@
      cmd_rustc_crate = RUST_MODFILE=$(obj)/vfio_iommu_dirty \
	$(RUSTC) $(filter-out --edition=% -D% -W%,$(rust_flags)) \
	--cap-lints=allow $(crate_fast) $(crate_flags) --crate-name $(crate_name) --crate-type rlib \
	--sysroot=/dev/null -L $(objtree)/rust -L $(obj) --out-dir $(obj) \
	--emit=dep-info=$(depfile) --emit=obj=$@ \
	--emit=metadata=$(obj)/lib$(crate_name).rmeta $(crate_src)

$(eval $(call crate,static_assertions,2018,$(src)/static_assertions/src/lib.rs,))
$(eval $(call crate,intrusive_collections,2018,$(src)/intrusive-collections/src/lib.rs,))
$(eval $(call crate,dirty_core,2021,$(src)/dirty-core/src/lib.rs,intrusive_collections static_assertions))

# In the v0 mangling, names of functions generic over the host are too long for objtool.
RUSTFLAGS_main.o := $(crate_fast) -Csymbol-mangling-version=legacy -L $(obj) --extern dirty_core
$(obj)/main.o: $(obj)/dirty_core.o
