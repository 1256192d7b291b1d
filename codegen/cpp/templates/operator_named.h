// Things that are found by name on each call. One that is there stays, so that a call needs no lock
// while it uses it.
template <typename Thing>
class Named {
    std::unordered_map<std::string, std::unique_ptr<const Thing>> found;
    mutable std::shared_mutex mutex;

  public:
    // Or nullptr.
    const Thing* find(const std::string& name) const {
        const std::shared_lock lock(mutex);
        const auto place = found.find(name);
        return place == found.end() ? nullptr : place->second.get();
    }

    const Thing* add(const std::string& name, std::unique_ptr<const Thing> thing) {
        const std::unique_lock lock(mutex);
        return found.emplace(name, std::move(thing)).first->second.get();
    }
};
