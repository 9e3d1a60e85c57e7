# SPDX-License-Identifier: GPL-2.0-only
# For Kbuild: the Rust half as one object that `build` makes, with the flags that
# arch/x86/Makefile has for Rust where there is such a configuration.
vfio_iommu_dirty-y += freestanding/support.o freestanding/rust.o

# Linux 6.9 gave these options a prefix.
dirty-on = $(or $(CONFIG_MITIGATION_$(1)),$(CONFIG_$(1)))
dirty-features := \
	$(if $(call dirty-on,RETPOLINE),+retpoline-external-thunk +retpoline-indirect-branches +retpoline-indirect-calls) \
	$(if $(call dirty-on,SLS),+harden-sls-ijmp +harden-sls-ret)
dirty-flags := \
	$(addprefix -Ctarget-feature=,$(subst $(space),$(comma),$(strip $(dirty-features)))) \
	$(if $(call dirty-on,RETHUNK),-Zfunction-return=thunk-extern) \
	$(if $(CONFIG_X86_KERNEL_IBT),-Zcf-protection=branch) \
	$(if $(CONFIG_CALL_PADDING),-Zpatchable-function-entry=$(CONFIG_FUNCTION_PADDING_BYTES)$(comma)$(CONFIG_FUNCTION_PADDING_BYTES)) \
	$(if $(CONFIG_FRAME_POINTER),-Cforce-frame-pointers=y) \
	$(if $(CONFIG_KASAN),$(RUSTFLAGS_KASAN)) \
	$(if $(shell $(RUSTC) -C help 2>/dev/null | grep -w jump-tables),-Cjump-tables=n,-Zno-jump-tables)

dirty-forbidden := $(if $(call dirty-on,RETPOLINE),indirect) $(if $(call dirty-on,RETHUNK),ret)

quiet_cmd_dirty_rust = RUSTC   $@
      cmd_dirty_rust = RUSTC='$(RUSTC)' sh $(src)/freestanding/build $(src) $(obj) $@ $(dirty-flags) && \
	sh $(src)/freestanding/check $@ $(dirty-forbidden) $(cmd_objtool)
dirty-crates := $(addprefix $(src)/,dirty-core intrusive-collections static_assertions freestanding/kernel)
$(obj)/freestanding/rust.o: $(wildcard $(src)/*.rs $(src)/freestanding/*.rs) $(shell find $(dirty-crates) -name '*.rs') \
		$(src)/glue.h $(addprefix $(src)/freestanding/,build check library link.lds) FORCE
	$(call if_changed,dirty_rust)
targets += freestanding/rust.o
clean-files += freestanding.out
