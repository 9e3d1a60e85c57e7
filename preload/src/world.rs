// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which groups and devices there are, as the environment says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use adapter_user::emulated::{DeviceFile, DeviceGroup, Features, MigrationVersion, Settings};
use adapter_user::{Group, GroupId, IommuSpec};

use crate::control;
use crate::engine::Engine;
use crate::mappings::Mappings;

/// The mappings of the container that a group is in.
type Place = Arc<Mutex<Weak<Mappings>>>;

struct World {
    groups: BTreeMap<u64, (Arc<DeviceGroup>, Place)>,
}

static OPENED: Mutex<Vec<Weak<DeviceFile>>> = Mutex::new(Vec::new());

/// Returns group `number`, if there is one. Without a valid environment there is none, and
/// standard error says why.
pub(crate) fn group(number: u64) -> Option<Arc<DeviceGroup>> {
    let (group, _) = world()?.groups.get(&number)?;
    Some(Arc::clone(group))
}

/// A group is about to join the container that has these mappings.
pub(crate) fn set_mappings(number: u64, mappings: &Arc<Mappings>) {
    let place = world().and_then(|world| world.groups.get(&number));
    if let Some((_, place)) = place {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(mappings);
    }
}

/// A device was opened: a test may drive it.
pub(crate) fn opened(device: &Arc<DeviceFile>) {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    opened.retain(|device| device.strong_count() != 0);
    opened.push(Arc::downgrade(device));
    drop(opened);
    control::listen(open_devices);
}

fn open_devices() -> Vec<Arc<DeviceFile>> {
    let opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    opened.iter().filter_map(Weak::upgrade).collect()
}

fn world() -> Option<&'static World> {
    static WORLD: OnceLock<Option<World>> = OnceLock::new();
    let made = WORLD.get_or_init(|| {
        let made = make(|name| std::env::var(name).ok());
        made.map_err(|error| eprintln!("vfio-preload: {error}"))
            .ok()
    });
    made.as_ref()
}

/// Makes the groups and devices that the variables of the environment ask for.
fn make(variable: impl Fn(&str) -> Option<String>) -> Result<World, String> {
    let variable = |name: &str, default: &str| variable(name).unwrap_or_else(|| default.to_owned());
    let tracking = variable("VFIO_PRELOAD_TRACKING", "container");
    let own_log = match tracking.as_str() {
        "container" => false,
        "device" => true,
        _ => {
            return Err(format!(
                "VFIO_PRELOAD_TRACKING is {tracking:?}: say container or device"
            ))
        }
    };
    let version = variable("VFIO_PRELOAD_MIGRATION", "v2");
    let migration = migration(&version)?;
    let settings = Settings { migration, own_log };
    let kind = variable("VFIO_PRELOAD_GROUP", "emulated");
    let group: fn(GroupId) -> Group = match kind.as_str() {
        "emulated" => Group::emulated,
        "iommu" => |id| Group::iommu(id, IommuSpec::default()),
        _ => {
            return Err(format!(
                "VFIO_PRELOAD_GROUP is {kind:?}: say emulated or iommu"
            ))
        }
    };
    let mut groups: BTreeMap<u64, (DeviceGroup, Place)> = BTreeMap::new();
    let devices = variable("VFIO_PRELOAD_DEVICES", "42:dev0");
    for device in devices.split(',') {
        let split = device.split_once(':');
        let split = split.and_then(|(number, name)| Some((number.parse().ok()?, name)));
        let (number, name): (u64, &str) = split.ok_or_else(|| {
            format!("VFIO_PRELOAD_DEVICES has {device:?}: say GROUP:NAME, as 42:dev0")
        })?;
        let (of_number, place) = groups.remove(&number).unwrap_or_else(|| {
            let place: Place = Arc::new(Mutex::new(Weak::new()));
            (DeviceGroup::new(group(GroupId(number))), place)
        });
        let mappings = Arc::clone(&place);
        let make = move |dma, _| {
            let mappings = Arc::clone(&mappings);
            Engine::new(
                dma,
                Box::new(move || {
                    mappings
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .upgrade()
                }),
            )
        };
        groups.insert(number, (of_number.with_device(name, settings, make), place));
    }
    let groups = groups.into_iter();
    let groups = groups.map(|(number, (group, place))| (number, (Arc::new(group), place)));
    Ok(World {
        groups: groups.collect(),
    })
}

/// `none`, `v1`, or `v2` with any of `+precopy` and `+p2p`.
fn migration(text: &str) -> Result<MigrationVersion, String> {
    let mut features = Features::default();
    let mut words = text.split('+');
    match words.next() {
        Some("none") if text == "none" => return Ok(MigrationVersion::None),
        Some("v1") if text == "v1" => return Ok(MigrationVersion::V1),
        Some("v2") => {}
        _ => return Err(bad_migration(text)),
    }
    for word in words {
        match word {
            "precopy" => features.pre_copy = true,
            "p2p" => features.p2p = true,
            _ => return Err(bad_migration(text)),
        }
    }
    Ok(MigrationVersion::V2(features))
}

fn bad_migration(text: &str) -> String {
    format!(
        "VFIO_PRELOAD_MIGRATION is {text:?}: say none, v1, v2, v2+precopy, v2+p2p or v2+precopy+p2p"
    )
}
